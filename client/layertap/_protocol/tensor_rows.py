"""The rows of one tensor, placed as they arrive, and the memory that several such tensors share. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

import numpy as np

from layertap import wire
from layertap.errors import DataLossError
from layertap.types import FloatArray
from layertap.v1 import embedding_pb2 as pb

_BLOCK_BYTES: Final = 8 << 20
"""What the rows of several texts share. numpy asks for large pages from 4 MiB on."""

Empty: TypeAlias = Callable[[tuple[int, int], pb.Dtype.ValueType], FloatArray]
"""Returns a new array for wire values."""


class TensorRows:
    """One tensor, and which of its rows have arrived.

    Rows that may be kept where they lie are not copied as long as all of them lie as the tensor would.
    """

    __slots__ = ("_array", "_came", "_dtype", "_empty", "_kept", "_origin", "shape")

    def __init__(self, row_count: int, row_size: int, dtype: pb.Dtype.ValueType, empty: Empty = wire.empty) -> None:
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


class Blocks:
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
