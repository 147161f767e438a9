"""All parts of a job as one table: its columns from end to end, or its rows block by block. Holds one block at most."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import numpy as np

from layertap import quantization
from layertap.jobs.columns import IDS, Array, Column, Label, as_string
from layertap.jobs.items import Value
from layertap.jobs.part import Part
from layertap.jobs.parts import Parts
from layertap.quantization import Precision

_BLOCK_BYTES: Final = 8 << 20
_BLOCK_TEXTS: Final = 16_384
"""Small parts are put together up to this, so that files of many rows do not come in crumbs."""

_WIDEST_STRING: Final = 1024
"""Longer strings are not written as arrays of strings, in which each value takes as much as the longest."""


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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Some texts that follow each other.

    Attributes:
        labels: Their ids and kept values, by name.
        arrays: The rows of these texts in each column.
    """

    labels: dict[str, list[Value]]
    arrays: dict[str, Array]


class Table:
    """What a job has made of its good items, in order."""

    def __init__(self, parts: Parts, *, precision: Precision = "float32") -> None:
        """Reads the columns of parts of which at least one has a good item; their matrices are quantized."""
        self._manifest = parts.manifest
        self._precision = precision
        self._parts = [part for part in parts.done if part.text_count]
        self._stored = self._parts[0].columns
        self.columns = tuple(map(self._quantized, self._stored))
        self.text_count = sum(part.text_count for part in self._parts)
        joined = map(Label.joined, zip(*(part.labels for part in self._parts), strict=True))
        # Ids are whole numbers if all of them are, else strings.
        self.labels = tuple(
            dataclasses.replace(one, kind="string") if one.name == IDS and one.kind not in ("integer", "long") else one
            for one in joined
        )

    @property
    def metadata(self) -> dict[str, str]:
        """What says, in a file, which model the numbers are of."""
        assert self._manifest is not None
        return {"model_id": self._manifest.model_id, "fingerprint": self._manifest.fingerprint}

    def members(self) -> list[Member]:
        """Returns all columns, each from end to end; without ids and kept values."""
        return [self._member(position, column) for position, column in enumerate(self.columns)]

    def label_members(self, *, has_strings: bool) -> list[Member]:
        """Returns ids and kept values as arrays.

        Numbers with nulls are floats, and NaN where they are null; a null among strings, or among integers that floats
        would round, is the empty string. Strings are one array, or for files that have none (and where one is very
        long) two: `NAME_utf8`, all of them in UTF-8, and `NAME_ends`, where each ends.
        """
        return [member for label in self.labels for member in self._label(label, has_strings)]

    def blocks(self) -> Iterator[Block]:
        """Yields all texts, block by block."""
        held: list[Part] = []
        size = texts = 0
        for part in self._parts:
            if held and (size + part.byte_count > _BLOCK_BYTES or texts + part.text_count > _BLOCK_TEXTS):
                yield self._block(held)
                held, size, texts = [], 0, 0
            held.append(part)
            size += part.byte_count
            texts += part.text_count
        yield self._block(held)

    def _block(self, parts: list[Part]) -> Block:
        read = [part.values() for part in parts]
        labels: dict[str, list[Value]] = {}
        for label in self.labels:
            values = [value for own in read for value in own[label.name]]
            is_string = label.kind in ("string", "null")
            labels[label.name] = [as_string(one) if is_string and one is not None else one for one in values]
        arrays = {column.name: [self._array(part, column) for part in parts] for column in self._stored}
        return Block(
            labels=labels,
            arrays={name: one[0] if len(one) == 1 else np.concatenate(one) for name, one in arrays.items()},
        )

    def _member(self, position: int, column: Column) -> Member:
        row_count = sum(part.row_counts[position] for part in self._parts)
        return Member(
            name=column.name,
            dtype=np.dtype(column.dtype),
            shape=(row_count, *column.row_shape),
            pieces=lambda: (self._array(part, self._stored[position]) for part in self._parts),
        )

    def _label(self, label: Label, has_strings: bool) -> list[Member]:
        def values() -> Iterator[list[Value]]:
            return (part.values()[label.name] for part in self._parts)

        def member(suffix: str, dtype: object, count: int, pieces: Callable[[], Iterable[Array]]) -> Member:
            return Member(name=label.name + suffix, dtype=np.dtype(dtype), shape=(count,), pieces=pieces)  # type: ignore[call-overload]

        if label.kind not in ("string", "null") and not (label.kind == "long" and label.null_count):
            dtype = {"bool": np.bool_, "integer": np.int64, "long": np.int64, "number": np.float64}[label.kind]
            dtype = np.float64 if label.null_count else dtype
            return [member("", dtype, self.text_count, lambda: (np.array(part, dtype) for part in values()))]
        if has_strings and label.characters <= _WIDEST_STRING:
            kind = f"<U{max(1, label.characters)}"
            return [
                member("", kind, self.text_count, lambda: (np.array(list(map(as_string, v)), kind) for v in values()))
            ]

        def data() -> Iterator[Array]:
            return (np.frombuffer("".join(map(as_string, part)).encode(), np.uint8) for part in values())

        def ends() -> Iterator[Array]:
            end = 0
            for part in values():
                ends = end + np.cumsum([len(as_string(one).encode()) for one in part], dtype=np.int64)
                end = int(ends[-1])
                yield ends

        return [
            member("_utf8", np.uint8, label.byte_count, data),
            member("_ends", np.int64, self.text_count, ends),
        ]

    def _array(self, part: Part, column: Column) -> Array:
        return self._quantize(part.array(column.name), column)

    def _quantize(self, array: Array, column: Column) -> Array:
        if self._precision == "float32" or not column.row_shape:
            return array
        ranges = self._ranges[column.name] if self._precision.endswith("int8") else None
        return quantization.quantize_embeddings(array, precision=self._precision, ranges=ranges)

    def _quantized(self, column: Column) -> Column:
        found = self._quantize(np.zeros((1, *column.row_shape), column.dtype), column)
        return dataclasses.replace(column, dtype=found.dtype.str, row_shape=found.shape[1:])

    @functools.cached_property
    def _ranges(self) -> dict[str, Array]:
        """The least and the greatest value of each dimension, over all texts. Shape of each: [2, dim]."""
        return {
            column.name: quantization.ranges_of(part.array(column.name) for part in self._parts)
            for column in self._stored
            if column.row_shape
        }
