"""Quantization of embeddings as in sentence-transformers: one byte for each value, or one bit.

Pure numpy. A byte divides the range of each dimension, over the given embeddings, into 256 steps. The bytes of a text
therefore depend on the other texts. To compare a corpus with queries, pass the `ranges` of the corpus for both. A bit
says whether a value is above 0, and depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from layertap.errors import InvalidArgumentError

Array: TypeAlias = npt.NDArray[Any]

Precision: TypeAlias = Literal["float32", "int8", "uint8", "binary", "ubinary"]
"""The number format of quantized embeddings."""

PRECISIONS: Final[tuple[Precision, ...]] = ("float32", "int8", "uint8", "binary", "ubinary")

_BLOCK_ROWS: Final = 4096
"""How many embeddings are converted at once, which bounds memory."""


def quantize_embeddings(
    embeddings: npt.ArrayLike, *, precision: Precision = "int8", ranges: npt.ArrayLike | None = None
) -> Array:
    """Returns quantized embeddings.

    Args:
        embeddings: Shape: [count, dim] or [dim].
        precision: "int8" and "uint8" (one byte for each value), "binary" and "ubinary" (one bit for each, eight to an
            int8 or uint8, the first in the highest bit), or "float32".
        ranges: For bytes: the least and the greatest value of each dimension, as in
            `np.stack([corpus.min(0), corpus.max(0)])`; values beyond are clipped. Shape: [2, dim]. None: those of the
            embeddings, which must then be at least two, and should be hundreds.

    Returns:
        The embeddings. Shape: as embeddings; for bits, the last dimension is an eighth of that, rounded up.

    Raises:
        InvalidArgumentError: if the precision is unknown, or the ranges are missing or of another shape.
    """
    check(precision)
    array = np.asarray(embeddings)
    if array.dtype.kind != "f":
        raise InvalidArgumentError(f"embeddings is of dtype {array.dtype}; only floats can be quantized")
    if precision == "float32":
        return array.astype(np.float32)
    if precision.endswith("binary"):
        return _bits(array, signed=precision == "binary")
    if ranges is None:
        ranges = _ranges([array], precision)
    lowest_and_highest = np.asarray(ranges, np.float32)
    if lowest_and_highest.shape != (2, *array.shape[-1:]):
        raise InvalidArgumentError(
            f"ranges has shape {lowest_and_highest.shape}; pass [2, dim], the least and the greatest value of each"
        )
    return _bytes(array, lowest_and_highest, signed=precision == "int8")


def quantize_matrices(matrices: Sequence[Array], *, precision: Precision) -> list[Array]:
    """Returns several quantized matrices, with the ranges of all rows together. Shape of each: [row_count, dim]."""
    by_range = check(precision).endswith("int8")
    ranges = _ranges(matrices, precision) if by_range and len(matrices) else None
    return [quantize_embeddings(matrix, precision=precision, ranges=ranges) for matrix in matrices]


def check(precision: Precision) -> Precision:
    """Returns a precision, after it has checked its name.

    Raises:
        InvalidArgumentError: if it is unknown.
    """
    if precision not in PRECISIONS:
        raise InvalidArgumentError(f"precision is {precision!r}; pass one of {', '.join(PRECISIONS)}")
    return precision


def _ranges(matrices: Sequence[Array], precision: Precision) -> Array:
    if sum(len(matrix) if matrix.ndim == 2 else 1 for matrix in matrices) == 1:
        raise InvalidArgumentError(
            f"one embedding alone has no ranges for precision {precision}; quantize several at once, or take float32 "
            "and quantize_embeddings with the ranges of others"
        )
    return ranges_of(matrices)


def ranges_of(matrices: Iterable[Array]) -> Array:
    """Returns the least and the greatest value of each dimension over all rows of matrices. Shape: [2, dim]."""
    least, greatest = np.array(np.inf, np.float32), np.array(-np.inf, np.float32)
    for matrix in matrices:
        least = np.minimum(least, matrix.min(axis=0, initial=np.inf))
        greatest = np.maximum(greatest, matrix.max(axis=0, initial=-np.inf))
    return np.stack([least, greatest])


def _bytes(array: Array, ranges: Array, *, signed: bool) -> Array:
    lowest, steps = ranges[0], (ranges[1] - ranges[0]) / 255
    steps = np.where(steps == 0, np.float32(1), steps)
    quantized = np.empty(array.shape, np.uint8)
    # A view of one embedding as a row writes into the same array.
    rows, out = np.atleast_2d(array), np.atleast_2d(quantized)
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        out[block] = np.clip(np.floor((rows[block] - lowest) / steps), 0, 255)
    return (quantized ^ 0x80).view(np.int8) if signed else quantized


def _bits(array: Array, *, signed: bool) -> Array:
    packed = np.packbits(array > 0, axis=-1)
    return (packed ^ 0x80).view(np.int8) if signed else packed
