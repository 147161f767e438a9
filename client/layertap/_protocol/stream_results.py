"""What came for single items of a stream: many small results in one message, or one large result in frames. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from layertap import wire
from layertap._protocol.answer_plan import AnswerPlan, Key, row_counts
from layertap._protocol.result_builder import Answer, read_timings
from layertap.errors import DataLossError
from layertap.types import FloatArray
from layertap.v1 import embedding_pb2 as pb


def text_answers(
    part: pb.EmbedStreamResponse, plan: AnswerPlan, data: memoryview, view: wire.View | None
) -> Iterator[tuple[int, Answer]]:
    """Yields the id and the answer of each item in one message.

    Args:
        part: The message.
        plan: What the stream promises.
        data: The payload of the message.
        view: Access to shared memory.

    Raises:
        DataLossError: if the message does not fit the header, or contradicts itself.
    """
    results = part.results
    lists: list[tuple[object, Sequence[object]]] = [
        *((True, one) for one in (results.token_counts, results.truncated, results.timings)),
        (plan.returns_tokens, results.tokens),
        (plan.words, results.words),
        (plan.spans, results.span_counts),
        (plan.has_windows, results.window_counts),
    ]
    counts = np.array(results.token_counts[:], np.int64)
    if any(len(values) != len(results.ids) for wanted, values in lists if wanted) or (counts < 1).any():
        raise DataLossError("the lists of the answer differ in length; ask again")
    token_counts, span_counts = counts.tolist(), list(results.span_counts)
    tensors = _tensors(part, plan, data, view)
    truncated = np.array(results.truncated[:], np.bool_)
    window_counts = np.array(results.window_counts[:] or [1] * len(counts), np.int64)
    ones = np.ones((1, sum(token_counts)), np.int64)
    tokens, words = list(results.tokens), list(results.words)
    raw, timings = pb.Timings(), read_timings(pb.Timings())
    start = 0
    for position, (index, token_count, of) in enumerate(zip(results.ids, token_counts, results.timings, strict=True)):
        after, end = position + 1, start + token_count
        if raw != of:
            raw, timings = of, read_timings(of)
        answer = Answer(
            arrays={key: array[rows[position] : rows[after]] for key, array, rows in tensors},
            token_counts=counts[position:after],
            truncated=truncated[position:after],
            window_counts=window_counts[position:after],
            span_counts=span_counts[position:after],
            attention_mask=ones[:, start:end],
            timings=timings,
            tokens=tokens[position:after],
            words=words[position:after],
        )
        yield index, answer
        start = end


def _tensors(
    part: pb.EmbedStreamResponse, plan: AnswerPlan, data: memoryview, view: wire.View | None
) -> list[tuple[Key, FloatArray, list[int]]]:
    """Returns each tensor of a message with its key, and where in it the rows of each item begin."""
    results, offsets, dtype = part.results, list(part.shared_rows.offsets), plan.header.dtype
    word_counts = [len(words.piece_counts) for words in results.words]
    tensors: list[tuple[Key, FloatArray, list[int]]] = []
    for output in plan.outputs:
        counts = row_counts(output.unit, results.token_counts, word_counts, results.span_counts)
        rows = [0, *itertools.accumulate(counts)]
        size = rows[-1] * output.row_size * wire.item_bytes(dtype)
        for key in output.keys:
            # Where it lies in shared memory; negative, or none for any: in `data`.
            if len(offsets) > len(tensors) and (offset := offsets[len(tensors)]) >= 0:
                if view is None:
                    raise DataLossError("results lie in shared memory that was not requested; ask again")
                payload: memoryview | wire.ByteArray = view(offset, size)
            else:
                payload, data = data[:size], data[size:]
            if len(payload) != size:
                raise DataLossError("the answer has less data than results; ask again")
            tensors.append((key, wire.to_array(payload, (rows[-1], output.row_size), dtype), rows))
    if data or len(offsets) not in (0, len(tensors)):
        raise DataLossError("the answer has more data than results; ask again")
    return tensors


class Frames:
    """The rows of one large item, which come in order in several frames."""

    def __init__(self, first: pb.StreamFrame, header: pb.EmbedHeader, bound: int) -> None:
        """Allocates all rows of the item.

        Args:
            first: The first frame.
            header: What the stream promises.
            bound: The most tokens or words that the item can have.

        Raises:
            DataLossError: if the frame promises more.
        """
        if not (1 <= first.token_count <= bound and 0 <= first.word_count <= bound and 0 <= first.span_count <= bound):
            raise DataLossError(f"item {first.id} has {first.token_count} tokens; ask again")
        self._dtype = header.dtype
        self._counts = first.token_count, first.word_count, first.span_count
        self._row_count = 0
        self._rows: dict[tuple[int, int], FloatArray] = {}
        for output_index, output in enumerate(header.outputs):
            (row_count,) = row_counts(output.unit, [first.token_count], [first.word_count], [first.span_count])
            for layer in output.layers:
                self._rows[output_index, layer] = wire.empty((row_count, output.row_size), header.dtype)

    def add(self, frame: pb.StreamFrame, data: memoryview) -> None:
        """Adds the rows of the next frame.

        Raises:
            DataLossError: if it is not the next one.
        """
        place = frame.output_index, frame.layer
        before = sum(len(array) for key, array in self._rows.items() if key < place) + frame.first_row
        came = frame.token_count, frame.word_count, frame.span_count, before
        if place not in self._rows or came != (*self._counts, self._row_count):
            raise DataLossError(f"the frames of item {frame.id} are out of order; ask again")
        rows = self._rows[place][frame.first_row : frame.first_row + frame.row_count]
        wire.read_into(rows, data, self._dtype)
        self._row_count += frame.row_count

    def answer(self, last: pb.StreamFrame) -> Answer:
        """Returns the answer of the item, after its last frame.

        Raises:
            DataLossError: if rows or words are missing.
        """
        if self._row_count != sum(map(len, self._rows.values())):
            raise DataLossError(f"the frames of item {last.id} are incomplete; ask again")
        if len(last.words.piece_counts) != last.word_count:
            raise DataLossError(f"the words of item {last.id} are not those of its frames; ask again")
        return Answer(
            arrays=self._rows,
            token_counts=np.array([last.token_count], np.int64),
            truncated=np.array([last.truncated], np.bool_),
            window_counts=np.array([last.window_count or 1], np.int64),
            span_counts=[last.span_count],
            attention_mask=np.ones((1, last.token_count), np.int64),
            timings=read_timings(last.timings),
            tokens=[last.tokens] if last.HasField("tokens") else [],
            words=[last.words] if last.HasField("words") else [],
        )
