"""Results of an EmbedStream as messages: small results share a message, large ones are divided into frames.

Pure apart from protobuf, like `responses`, whose parts it uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final

from layertap import wire
from layertap.errors import LayertapError
from layertap.v1 import embedding_pb2 as pb
from layertap_server.model.tokenized import Tokenized
from layertap_server.model.tokenizer import Tokenizer
from layertap_server.protocol import responses
from layertap_server.protocol.responses import HEAD_BYTES, TEXT_BYTES, list_bytes
from layertap_server.scheduler.events import RowsReady
from layertap_server.shared_memory.segment import Lending
from layertap_server.types import Plan


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)  # Not frozen: one a text is made, in a third of the time.
class Result:
    """One text of an EmbedStream: its rows by output and layer, or its error.

    Attributes:
        id: The id that the caller gave it.
        tokenized: The text; None: it failed before it had tokens.
        parts: For each output in order and each of its layers ascending: output index, layer, rows.
        timings: The time that its parts took.
        error: Why it has no rows. None: it has.
        run: An object that texts of the same run share.
        position: Its position in the run; its rows follow those of the text before.
    """

    id: int
    tokenized: Tokenized | None = None
    parts: Sequence[tuple[int, int, memoryview]] = ()
    timings: pb.Timings | None = None
    error: LayertapError | None = None
    run: object = None
    position: int = 0


MAX_RESULT_COUNT: Final = 512
"""Results in one message: to pack so many takes less than 10 ms of the event loop, whatever little each has."""


def messages(
    batch: Sequence[Result], plan: Plan, tokenizer: Tokenizer, max_frame_bytes: int, lending: Lending | None = None
) -> Iterator[tuple[bytes, Sequence[Result]]]:
    """Yields results as EmbedStream messages, each with the results that it completes.

    Results whose rows follow each other in shared memory share a message with their offsets. Of the others, small ones
    share a message, and large ones are divided into frames.
    """
    for stretch, lent in _stretches(batch, lending):
        if lent:
            yield from _lent(stretch, plan, tokenizer, max_frame_bytes, lent)
        else:
            yield from _sent(stretch, plan, tokenizer, max_frame_bytes)


def _stretches(batch: Sequence[Result], lending: Lending | None) -> Iterator[tuple[Sequence[Result], Lending | None]]:
    """Yields results that follow each other in shared memory with their lending, and all others with None."""
    if lending is None:
        yield batch, None
        return
    stretch: list[Result] = []
    lent: Lending | None = None
    for result in batch:
        last = stretch[-1] if stretch else None
        if last is None or result.run is not last.run or result.error is not None or last.error is not None:
            lies_there = any(lending.offset_of(rows) is not None for _, _, rows in result.parts)
            goes_on = last is not None and not lies_there and lent is None
        else:
            lies_there = lent is not None
            goes_on = lent is None or result.position == last.position + 1
        if not goes_on:
            if stretch:
                yield stretch, lent
            stretch, lent = [], lending if lies_there else None
        stretch.append(result)
    if stretch:
        yield stretch, lent


def _lent(
    batch: Sequence[Result], plan: Plan, tokenizer: Tokenizer, max_frame_bytes: int, lending: Lending
) -> Iterator[tuple[bytes, Sequence[Result]]]:
    """Yields messages for consecutive texts of one run of which at least one output is in shared memory."""
    room = max_frame_bytes - HEAD_BYTES
    local = [n for n, rows in enumerate(_first_rows(batch)) if lending.offset_of(rows) is None]
    packed: list[Result] = []
    size = 0
    for result in (*batch, None):
        own = 0
        if result is not None:
            own = TEXT_BYTES + sum(len(result.parts[n][2]) for n in local) + _list_bytes(result, plan)
        if packed and (result is None or size + own > room or len(packed) == MAX_RESULT_COUNT):
            shared = responses.shared_rows(_first_rows(packed), lending) if size <= room else None
            if shared is None:
                yield from _sent(packed, plan, tokenizer, max_frame_bytes)
            else:
                yield _pack(packed, plan, tokenizer, shared), packed
            packed, size = [], 0
        if result is not None:
            packed.append(result)
            size += own


def _first_rows(batch: Sequence[Result]) -> list[memoryview]:
    """Returns, by output and layer, the first rows of consecutive results that are not empty, if there are any."""
    columns = zip(*(result.parts for result in batch), strict=True)
    return [next((rows for _, _, rows in column if len(rows)), column[0][2]) for column in columns]


def _sent(
    batch: Sequence[Result], plan: Plan, tokenizer: Tokenizer, max_frame_bytes: int
) -> Iterator[tuple[bytes, Sequence[Result]]]:
    """Yields results as messages with their rows."""
    room = max_frame_bytes - HEAD_BYTES
    packed: list[Result] = []
    size = 0
    has_lists = plan.return_tokens or plan.has_words or plan.has_spans
    for result in batch:
        own = TEXT_BYTES
        for _, _, rows in result.parts:
            own += len(rows)
        if has_lists:
            own += _list_bytes(result, plan)
        if result.error is not None:
            own += len(result.error.details.encode())
        if packed and (size + own > room or len(packed) == MAX_RESULT_COUNT):
            yield _pack(packed, plan, tokenizer), packed
            packed, size = [], 0
        if own > room:
            *frames, last = _spread(result, plan, tokenizer, max_frame_bytes)
            yield from ((frame(), ()) for frame in frames)
            yield last(), (result,)
        else:
            packed.append(result)
            size += own
    if packed:
        yield _pack(packed, plan, tokenizer), packed


def split_run(ready: Sequence[RowsReady], plan: Plan) -> list[list[tuple[int, int, memoryview]]]:
    """Returns the rows of each text of a run, by output and layer."""
    order = sorted(ready, key=lambda part: (part.rows.output_index, part.rows.layer))
    texts: list[list[tuple[int, int, memoryview]]] = [[] for _ in order[0].texts]
    for part in order:
        output = plan.outputs[part.rows.output_index]
        row_bytes, start = plan.row_bytes(output), 0
        for own, row_count in zip(texts, output.row_counts(part.texts), strict=True):
            end = start + row_bytes * row_count
            own.append((part.rows.output_index, part.rows.layer, part.rows.data[start:end]))
            start = end
    return texts


def failures_of(ready: Sequence[RowsReady]) -> Mapping[int, LayertapError]:
    """Returns the texts, by position in the run, that failed, each with its first error."""
    failures: dict[int, LayertapError] = {}
    for part in ready:
        for position, error in part.rows.failures.items():
            failures.setdefault(position, error)
    return failures


def _list_bytes(result: Result, plan: Plan) -> int:
    return 0 if result.tokenized is None else list_bytes(plan, result.tokenized.text)


def _pack(batch: Sequence[Result], plan: Plan, tokenizer: Tokenizer, shared: pb.SharedRows | None = None) -> bytes:
    good = [result for result in batch if result.error is None]
    texts = [result.tokenized for result in good if result.tokenized is not None]
    message = pb.StreamResults(
        ids=[result.id for result in good],
        token_counts=[len(one.text.input_ids) for one in texts],
        truncated=[one.truncated for one in texts],
        timings=[result.timings for result in good if result.timings is not None],
    )
    if len(good) < len(batch):
        message.failures.extend(
            pb.StreamFailure(id=result.id, code=int(result.error.code), message=result.error.details)
            for result in batch
            if result.error is not None
        )
    if plan.return_tokens:
        message.tokens.extend(responses.tokens(one, tokenizer) for one in texts)
    if plan.has_words:
        message.words.extend(map(responses.words, texts))
    if plan.has_spans:
        message.span_counts.extend(one.text.span_count for one in texts)
    if plan.of_windows is not None:
        message.window_counts.extend(one.text.window_count for one in texts)
    tensors = list(zip(*(result.parts for result in good), strict=True))
    if shared is not None:
        tensors = [parts for parts, offset in zip(tensors, shared.offsets, strict=True) if offset == -1]
    data = [rows for parts in tensors for _, _, rows in parts]
    return wire.join(pb.EmbedStreamResponse(results=message, shared_rows=shared), *data)


def _spread(result: Result, plan: Plan, tokenizer: Tokenizer, max_frame_bytes: int) -> Iterator[Callable[[], bytes]]:
    """Yields functions that make the frames of one large result, so that only one frame is in memory at a time."""
    assert result.tokenized is not None
    text = result.tokenized.text
    last = next(part for part in reversed(result.parts) if len(part[2]))
    own_tokens = responses.tokens(result.tokenized, tokenizer) if plan.return_tokens else None
    own_words = responses.words(result.tokenized) if plan.has_words else None
    max_data_bytes = max_frame_bytes - sum(own.ByteSize() for own in (own_tokens, own_words) if own is not None)
    for part in result.parts:
        output_index, layer, rows = part
        output = plan.outputs[output_index]
        (row_count,) = output.row_counts([text])
        row_bytes = plan.row_bytes(output)
        for first, taken in responses.cuts(row_count, row_bytes, max_data_bytes):
            frame = pb.StreamFrame(
                id=result.id,
                output_index=output_index,
                layer=layer,
                first_row=first,
                row_count=taken,
                token_count=text.token_count,
                word_count=text.word_count,
                span_count=text.span_count,
                window_count=0 if plan.of_windows is None else text.window_count,
                truncated=result.tokenized.truncated,
                done=part is last and first + taken == row_count,
            )
            if frame.done:
                frame.timings.CopyFrom(result.timings or pb.Timings())
                if own_tokens is not None:
                    frame.tokens.CopyFrom(own_tokens)
                if own_words is not None:
                    frame.words.CopyFrom(own_words)
            data = rows[first * row_bytes : (first + taken) * row_bytes]
            yield partial(wire.join, pb.EmbedStreamResponse(frame=frame), data)
