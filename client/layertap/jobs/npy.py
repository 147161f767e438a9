"""numpy's own files, written piece by piece: arrays larger than memory, the same bytes each time."""

from __future__ import annotations

import dataclasses
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One array of a file.

    Attributes:
        name: What it is called.
        dtype: The type of its values.
        shape: Its shape, all pieces together.
        pieces: Gives it piece by piece, along the first axis.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Array]]

    @property
    def byte_count(self) -> int:
        """How many bytes its values take."""
        return math.prod(self.shape) * self.dtype.itemsize

    def buffers(self) -> Iterator[memoryview]:
        """Yields its bytes, row-major."""
        for piece in self.pieces():
            if piece.size:
                yield np.ascontiguousarray(piece, self.dtype).reshape(-1).view(np.uint8).data


def write_npy(file: BinaryIO, member: Member) -> None:
    """Writes one array as .npy."""
    _write(file, member)


def write_npz(file: BinaryIO, members: Iterable[Member], *, extra: dict[str, bytes] | None = None) -> None:
    """Writes arrays as .npz, not compressed, dated 1980.

    Args:
        file: Where to.
        members: The arrays.
        extra: Files that go along, by name.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in (extra or {}).items():
            archive.writestr(zipfile.ZipInfo(name), data)
        for member in members:
            with archive.open(zipfile.ZipInfo(member.name + ".npy"), "w", force_zip64=True) as entry:
                _write(entry, member)


def _write(file: Any, member: Member) -> None:
    header = {"descr": member.dtype.str, "fortran_order": False, "shape": member.shape}
    np.lib.format.write_array_header_1_0(file, header)
    for buffer in member.buffers():
        file.write(buffer)
