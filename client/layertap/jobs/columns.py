"""The columns of an output: arrays with rows of numbers, and labels, which are ids and kept values.

Pure. Says what the values of many parts are together, so that each format can choose how to write them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from layertap.jobs.items import Value
from layertap.results.export import Column as ResultColumn

Array: TypeAlias = npt.NDArray[Any]

IDS: Final = "ids"

_JOINED: Final = {frozenset(("integer", "number")): "number", frozenset(("integer", "long")): "long"}
"""What values of several kinds are together; all others are strings."""

_FLOAT_DIGITS: Final = 2**53
"""Floats hold all digits of integers up to this."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One array of the output.

    Attributes:
        name: What it is called.
        dtype: The type of its values, as numpy writes it.
        row_shape: The shape of one row.
        counts: The column that says how many rows each text has; empty: one each.
    """

    name: str
    dtype: str
    row_shape: tuple[int, ...]
    counts: str = ""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.row_shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """One column of ids or kept values, which are no arrays: what must be known to write it.

    Attributes:
        name: What it is called.
        kind: "bool", "integer", "long" (integers of which no float holds all digits), "number", "string", or "null" if
            all are null.
        null_count: Values that are null.
        characters: Those of the longest value as a string.
        byte_count: Of all values as strings in UTF-8, one after the other.
    """

    name: str
    kind: str
    null_count: int
    characters: int
    byte_count: int

    @classmethod
    def of(cls, name: str, values: Sequence[Value]) -> Label:
        """Returns what some values are."""
        strings = list(map(as_string, values))
        return cls(
            name=name,
            kind=_common(map(_kind, values)),
            null_count=sum(value is None for value in values),
            characters=max(map(len, strings), default=0),
            byte_count=sum(len(one.encode()) for one in strings),
        )

    @classmethod
    def joined(cls, labels: Sequence[Label]) -> Label:
        """Returns what the values of several parts are together."""
        return cls(
            name=labels[0].name,
            kind=_common(one.kind for one in labels),
            null_count=sum(one.null_count for one in labels),
            characters=max(one.characters for one in labels),
            byte_count=sum(one.byte_count for one in labels),
        )


def rows_of(columns: Iterable[ResultColumn]) -> tuple[tuple[Column, ...], list[Array]]:
    """Returns the columns of one text as a part has them, and the rows of each."""
    named = [(column.name, np.asarray(column.values), column.counts) for column in columns]
    found = tuple(
        Column(
            name=name,
            dtype=rows.dtype.str,
            row_shape=rows.shape[1:],
            counts="" if counts is None else _name_of(counts, named),
        )
        for name, rows, counts in named
    )
    return found, [rows for _, rows, _ in named]


def _name_of(counts: Array, named: Iterable[tuple[str, Array, Array | None]]) -> str:
    """Returns which column has the counts of another: the same memory, perhaps as another view of it."""
    return next(name for name, values, _ in named if values is counts or np.shares_memory(values, counts))


def as_string(value: Value) -> str:
    """Returns an id or kept value as a string; null is the empty one."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def _common(kinds: Iterable[str]) -> str:
    """Returns the kind of values of several kinds."""
    found = set(kinds) - {"null"}
    if len(found) > 1:
        return _JOINED.get(frozenset(found), "string")
    return found.pop() if found else "null"


def _kind(value: Value) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        if -_FLOAT_DIGITS <= value <= _FLOAT_DIGITS:
            return "integer"
        return "long" if -(2**63) <= value < 2**63 else "string"
    return "number" if isinstance(value, float) else "string"
