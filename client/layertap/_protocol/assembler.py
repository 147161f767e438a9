"""The messages of one EmbedLayers answer, assembled into arrays.

Pure: parsed messages and payloads in, results out. Rows are placed by the position their frame names, never by
arrival, and copied once; rows in shared memory that make a whole tensor not even that. A frame that overlaps another,
reaches past its tensor or is missing is an error, so that no array is wrong.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from layertap import wire
from layertap._protocol.answer_plan import AnswerPlan, check_header, row_counts, tensor_shapes
from layertap._protocol.responses import ModelPin, build_whole
from layertap._protocol.tensor_rows import Blocks, TensorRows
from layertap.errors import DataLossError
from layertap.results.embedding import Embedding
from layertap.results.streamed import LayerRows
from layertap.types import FloatArray
from layertap.v1 import embedding_pb2 as pb


class EmbedAssembler:
    """Assembles one EmbedLayers answer.

    Attributes:
        request_id: The name of the call in the server's log; None: unknown.
    """

    def __init__(self, messages: list[pb.Input], options: pb.EmbedOptions, pin: ModelPin | None = None) -> None:
        self._pin = pin or ModelPin()
        self._messages = messages
        self._options = options
        self._header: pb.EmbedHeader | None = None
        self._plan: AnswerPlan | None = None
        self._tensors: dict[tuple[int, int], TensorRows] = {}
        self._starts: dict[pb.RowUnit.ValueType, list[int]] = {}
        self._tokens: list[pb.TokenizedText] = []
        self._words: list[pb.SplitText] = []
        self._frame_count = 0
        self._summary: pb.EmbedSummary | None = None
        self.request_id: str | None = None

    def feed(self, part: pb.EmbedLayersResponse, data: wire.Buffer, view: wire.View | None = None) -> None:
        """Adds one message of a stream, with its payload and the shared rows it refers to.

        Raises:
            DataLossError: if the message does not fit those before it.
        """
        kind = part.WhichOneof("part")
        if self._summary is not None:
            raise DataLossError("the answer goes on after its summary; ask again")
        if (kind == "header") != (self._header is None):
            raise DataLossError("the answer does not open with exactly one header; ask again")
        if kind == "header":
            self._open(part.header)
        elif kind == "tokens":
            if part.tokens.first_text != len(self._tokens):
                raise DataLossError(f"the tokens of text {len(self._tokens)} are missing; ask again")
            self._tokens.extend(part.tokens.texts)
        elif kind == "words":
            if part.words.first_text != len(self._words):
                raise DataLossError(f"the words of text {len(self._words)} are missing; ask again")
            self._words.extend(part.words.texts)
        elif kind == "frame":
            self._frame_count += 1
            rows, start = self._locate(part.frame)
            rows.place(start, part.frame.row_count, _payload(part, data, view, rows.row_bytes))
        elif kind == "summary":
            self._summary = part.summary
        else:
            raise DataLossError("the answer has an unknown part; the server is newer than this client")

    def finish(self) -> Embedding:
        """Returns the embedding once the stream has ended.

        Raises:
            DataLossError: if something is missing.
        """
        if self._header is None or self._plan is None or self._summary is None:
            raise DataLossError("the answer ended without its summary; ask again")
        if self._summary.frame_count != self._frame_count:
            raise DataLossError(f"{self._frame_count} of {self._summary.frame_count} frames came; ask again")
        for (output_index, layer), rows in self._tensors.items():
            if not rows.complete:
                raise DataLossError(f"output {output_index}, layer {layer} is incomplete; ask again")
        return build_whole(
            self._header,
            self._plan,
            {key: rows.array for key, rows in self._tensors.items()},
            self._messages,
            timings=self._summary.timings,
            tokens=self._tokens,
            words=self._words,
            request_id=self.request_id,
        )

    def _open(self, header: pb.EmbedHeader) -> None:
        self._plan = check_header(header, self._options, self._messages)
        self._pin.check(header.model_id, header.fingerprint)
        self._header = header
        for unit in {output.unit for output in header.outputs}:
            counts = row_counts(unit, header.token_counts, header.word_counts, header.span_counts)
            self._starts[unit] = [0, *itertools.accumulate(counts)]
        for key, (row_count, row_size) in tensor_shapes(self._plan, header).items():
            self._tensors[key] = TensorRows(row_count, row_size, header.dtype)

    def _locate(self, frame: pb.Frame) -> tuple[TensorRows, int]:
        assert self._header is not None
        rows = self._tensors.get((frame.output_index, frame.layer))
        if rows is None or not 0 <= frame.first_text < len(self._header.token_counts):
            raise DataLossError(f"a frame names output {frame.output_index}, layer {frame.layer}; ask again")
        unit = self._header.outputs[frame.output_index].unit
        first_row = 0 if unit == pb.ROW_UNIT_TEXT else frame.first_row
        return rows, self._starts[unit][frame.first_text] + first_row


def _payload(
    part: pb.EmbedLayersResponse, data: wire.Buffer, view: wire.View | None, row_bytes: int
) -> memoryview | wire.ByteArray:
    """Returns the rows of a frame, from wherever they lie."""
    if not part.HasField("shared_rows"):
        return memoryview(data)
    if view is None or len(part.shared_rows.offsets) != 1:
        raise DataLossError("a frame lies in shared memory that was not requested; ask again")
    return view(part.shared_rows.offsets[0], part.frame.row_count * row_bytes)


class LayerAssembler:
    """Returns the rows of an EmbedLayers answer as they arrive, by whole texts."""

    def __init__(self, messages: list[pb.Input], options: pb.EmbedOptions, pin: ModelPin | None = None) -> None:
        self._pin = pin or ModelPin()
        self._messages = messages
        self._options = options
        self._header: pb.EmbedHeader | None = None
        self._open: dict[tuple[int, int], tuple[TensorRows, int]] = {}
        self._done: dict[int, npt.NDArray[np.bool_]] = {}
        self._blocks: dict[int, Blocks] = {}
        self._ended = False

    def feed(self, part: pb.EmbedLayersResponse, data: wire.Buffer, view: wire.View | None = None) -> list[LayerRows]:
        """Adds one message as `EmbedAssembler.feed` does; returns the texts that it completed.

        Raises:
            DataLossError: if the message does not fit those before it.
        """
        kind = part.WhichOneof("part")
        if (kind == "header") != (self._header is None) or self._ended:
            raise DataLossError("the answer is out of order; ask again")
        if kind == "header":
            check_header(part.header, self._options, self._messages)
            self._pin.check(part.header.model_id, part.header.fingerprint)
            self._header = part.header
            layers, counts = part.header.outputs[0].layers, part.header.token_counts
            self._done = {layer: np.zeros(len(counts), np.bool_) for layer in layers}
            self._blocks = {layer: Blocks(sum(counts)) for layer in layers}
        elif kind == "summary":
            self._ended = True
        elif kind == "frame":
            return self._frame(part.frame, _payload(part, data, view, self._row_bytes))
        else:
            raise DataLossError("the answer has a part that was not requested; ask again")
        return []

    @property
    def _row_bytes(self) -> int:
        assert self._header is not None
        return self._header.outputs[0].row_size * wire.item_bytes(self._header.dtype)

    def finish(self) -> None:
        """Checks, once the stream has ended, that nothing is missing.

        Raises:
            DataLossError: if something is missing.
        """
        if self._header is None or not self._ended:
            raise DataLossError("the answer ended without its summary; ask again")
        if not all(done.all() for done in self._done.values()):
            raise DataLossError("rows of the answer are missing; ask again")

    def _frame(self, frame: pb.Frame, data: memoryview | wire.ByteArray) -> list[LayerRows]:
        assert self._header is not None
        output, texts_done = self._header.outputs[0], self._done.get(frame.layer)
        if frame.output_index or texts_done is None or frame.first_text < 0:
            raise DataLossError(f"a frame names layer {frame.layer}, which was not requested; ask again")
        counts, empty = self._header.token_counts, self._blocks[frame.layer].empty
        row_bytes = self._row_bytes
        text, row, left = frame.first_text, frame.first_row, frame.row_count
        first, done = text, list[FloatArray]()
        while left > 0 and text < len(counts):
            if texts_done[text]:
                raise DataLossError(f"text {text} of layer {frame.layer} came twice; ask again")
            count = min(left, counts[text] - row)
            begun = self._open.pop((frame.layer, text), None)
            rows, came = begun or (TensorRows(counts[text], output.row_size, self._header.dtype, empty), 0)
            rows.place(row, count, data[: count * row_bytes])
            data, left, came = data[count * row_bytes :], left - count, came + count
            if came == counts[text]:
                done.append(rows.array)
                texts_done[text] = True
            else:
                self._open[frame.layer, text] = rows, came
                first = text + 1 if not done else first
            text, row = text + 1, 0
        if left or len(data):
            raise DataLossError("a frame reaches past the last text; ask again")
        return [LayerRows(layer=frame.layer, texts=range(first, first + len(done)), rows=done)] if done else []
