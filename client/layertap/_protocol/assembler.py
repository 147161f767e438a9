"""The messages of one EmbedLayers answer, assembled into arrays.

Pure: parsed messages and payloads in, results out. Rows are placed by the position their frame names, never by
arrival, and copied once; rows in shared memory that make a whole tensor not even that. A frame that overlaps another,
reaches past its tensor or is missing is an error, so that no array is wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from layertap import wire
from layertap._protocol.responses import ModelPin, build_whole, check_header, row_counts, tensor_shapes
from layertap.errors import DataLossError
from layertap.results.embedding import Embedding
from layertap.results.streamed import LayerRows
from layertap.types import FloatArray
from layertap.v1 import embedding_pb2 as pb

_BLOCK_BYTES: Final = 8 << 20
"""What the rows of several texts share. numpy asks for large pages from 4 MiB on."""


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
        self._tensors: dict[tuple[int, int], _Rows] = {}
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
        if self._header is None or self._summary is None:
            raise DataLossError("the answer ended without its summary; ask again")
        if self._summary.frame_count != self._frame_count:
            raise DataLossError(f"{self._frame_count} of {self._summary.frame_count} frames came; ask again")
        for (output_index, layer), rows in self._tensors.items():
            if not rows.complete:
                raise DataLossError(f"output {output_index}, layer {layer} is incomplete; ask again")
        return build_whole(
            self._header,
            self._options,
            {key: rows.array for key, rows in self._tensors.items()},
            self._messages,
            timings=self._summary.timings,
            tokens=self._tokens,
            words=self._words,
            request_id=self.request_id,
        )

    def _open(self, header: pb.EmbedHeader) -> None:
        check_header(header, self._options, self._messages)
        self._pin.check(header.model_id, header.fingerprint)
        self._header = header
        for unit in {output.unit for output in header.outputs}:
            counts = row_counts(unit, header.token_counts, header.word_counts, header.span_counts)
            self._starts[unit] = [0, *itertools.accumulate(counts)]
        for key, (row_count, row_size) in tensor_shapes(header).items():
            self._tensors[key] = _Rows(row_count, row_size, header.dtype)

    def _locate(self, frame: pb.Frame) -> tuple[_Rows, int]:
        assert self._header is not None
        rows = self._tensors.get((frame.output_index, frame.layer))
        if rows is None or not 0 <= frame.first_text < len(self._header.token_counts):
            raise DataLossError(f"a frame names output {frame.output_index}, layer {frame.layer}; ask again")
        unit = self._header.outputs[frame.output_index].unit
        first_row = 0 if unit == pb.ROW_UNIT_TEXT else frame.first_row
        return rows, self._starts[unit][frame.first_text] + first_row


_Empty: TypeAlias = Callable[[tuple[int, int], pb.Dtype.ValueType], FloatArray]
"""Returns a new array for wire values."""


class _Rows:
    """One tensor, and which of its rows have arrived.

    Rows that may be kept where they lie are not copied as long as all of them lie as the tensor would.
    """

    __slots__ = ("_array", "_came", "_dtype", "_empty", "_kept", "_origin", "shape")

    def __init__(self, row_count: int, row_size: int, dtype: pb.Dtype.ValueType, empty: _Empty = wire.empty) -> None:
        wire.array_dtype(dtype)  # Refuses what this client does not know.
        self.shape = row_count, row_size
        self._empty = empty
        self._array: FloatArray | None = None
        self._came = np.zeros(row_count, np.bool_)
        self._dtype = dtype
        self._kept: dict[int, wire.ByteArray] = {}
        self._origin = 0

    @property
    def array(self) -> FloatArray:
        if self._array is None:
            if self._kept and self.complete:
                whole = wire.joined([self._kept[start] for start in sorted(self._kept)])
                self._array = wire.to_array(whole, self.shape, self._dtype)
            else:
                self._array = self._empty(self.shape, self._dtype)
                for start, data in self._kept.items():
                    wire.read_into(self._array[start : start + len(data) // self.row_bytes], data, self._dtype)
            self._kept = {}
        return self._array

    @property
    def row_bytes(self) -> int:
        return self.shape[1] * wire.item_bytes(self._dtype)

    @property
    def complete(self) -> bool:
        return bool(self._came.all())

    def place(self, start: int, count: int, data: wire.Buffer | wire.ByteArray) -> None:
        came = self._came[start : start + count]
        if start < 0 or count < 1 or len(came) != count or came.any():
            raise DataLossError(
                f"a frame of {count} rows at row {start} overlaps another or its tensor's end; ask again"
            )
        if not self._keep(start, count, data):
            wire.read_into(self.array[start : start + count], data, self._dtype)
        came[:] = True

    def _keep(self, start: int, count: int, data: wire.Buffer | wire.ByteArray) -> bool:
        """Keeps rows where they lie if the whole tensor may lie there."""
        if self._array is not None or not isinstance(data, np.ndarray) or data.nbytes != count * self.row_bytes:
            return False
        origin = wire.address(data) - start * self.row_bytes
        if self._kept and origin != self._origin:
            return False
        self._origin = origin
        self._kept[start] = data
        return True


def _payload(
    part: pb.EmbedLayersResponse, data: wire.Buffer, view: wire.View | None, row_bytes: int
) -> memoryview | wire.ByteArray:
    """Returns the rows of a frame, from wherever they lie."""
    if not part.HasField("shared_rows"):
        return memoryview(data)
    if view is None or len(part.shared_rows.offsets) != 1:
        raise DataLossError("a frame lies in shared memory that was not requested; ask again")
    return view(part.shared_rows.offsets[0], part.frame.row_count * row_bytes)


class _Blocks:
    """New arrays, several of which share a block: the system gives pages to large blocks at a fraction of the cost."""

    def __init__(self, row_count: int) -> None:
        """Starts with no block.

        Args:
            row_count: How many rows all arrays have together.
        """
        self._left = row_count
        self._rest: FloatArray | None = None

    def empty(self, shape: tuple[int, int], dtype: pb.Dtype.ValueType) -> FloatArray:
        """Returns a new array for wire values."""
        row_count, row_size = shape
        if self._rest is None or len(self._rest) < row_count:
            most = -(-_BLOCK_BYTES // (row_size * wire.item_bytes(dtype)))
            self._rest = wire.empty((max(row_count, min(most, self._left)), row_size), dtype)
        found, self._rest = self._rest[:row_count], self._rest[row_count:]
        self._left -= row_count
        return found


class LayerAssembler:
    """Returns the rows of an EmbedLayers answer as they arrive, by whole texts."""

    def __init__(self, messages: list[pb.Input], options: pb.EmbedOptions, pin: ModelPin | None = None) -> None:
        self._pin = pin or ModelPin()
        self._messages = messages
        self._options = options
        self._header: pb.EmbedHeader | None = None
        self._open: dict[tuple[int, int], tuple[_Rows, int]] = {}
        self._done: dict[int, npt.NDArray[np.bool_]] = {}
        self._blocks: dict[int, _Blocks] = {}
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
            self._blocks = {layer: _Blocks(sum(counts)) for layer in layers}
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
            rows, came = begun or (_Rows(counts[text], output.row_size, self._header.dtype, empty), 0)
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
