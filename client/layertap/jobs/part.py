"""One part of a job, on the disk: what came of a run of items, which are rows, ids, kept values and bad items.

A part is closed by count or size, which the items alone decide, so parts are the same wherever a job was interrupted.
It is written once, as a whole, with its checksum: a line of JSON, then the bytes of its arrays.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from layertap.jobs import JobError, atomic_files
from layertap.jobs.columns import IDS, Array, Column, Label
from layertap.jobs.items import BadItem, Item, Value

LAYOUT: Final = 2
"""The number of this layout of parts; a job begun in another one is done again."""

MAX_PART_BYTES: Final = 16 << 20
"""A part that has as much is closed."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part that is written, and what one needs to know of it without opening it again.

    Attributes:
        path: Where it is.
        item_count: Good and bad items.
        bad_count: Bad ones.
        digest: The sum over all items up to its end.
        columns: Its arrays; none if all items are bad.
        row_counts: The rows of each of them.
        labels: Its ids and kept values.
    """

    path: Path
    item_count: int
    bad_count: int
    digest: str
    columns: tuple[Column, ...]
    row_counts: tuple[int, ...]
    labels: tuple[Label, ...]

    @property
    def text_count(self) -> int:
        """Good items."""
        return self.item_count - self.bad_count

    @property
    def byte_count(self) -> int:
        """Bytes of its arrays."""
        return sum(count * column.row_bytes for count, column in zip(self.row_counts, self.columns, strict=True))

    @classmethod
    def read(cls, path: Path) -> Part:
        """Returns the part in a file."""
        fields = _head(path)["facts"]
        columns = tuple(Column(**{**one, "row_shape": tuple(one["row_shape"])}) for one in fields.pop("columns"))
        labels = tuple(Label(**one) for one in fields.pop("labels"))
        row_counts = tuple(fields.pop("row_counts"))
        return cls(path=path, columns=columns, labels=labels, row_counts=row_counts, **fields)

    def values(self) -> dict[str, list[Value]]:
        """Returns its ids and kept values."""
        values: dict[str, list[Value]] = _head(self.path)["labels"]
        return values

    def bad(self) -> list[BadItem]:
        """Returns its bad items."""
        return [BadItem(**fields) for fields in _head(self.path)["bad"]] if self.bad_count else []

    def array(self, name: str) -> Array:
        """Returns one of its arrays."""
        with self.path.open("rb") as file:
            file.readline()
            file.readline()
            for column, row_count in zip(self.columns, self.row_counts, strict=True):
                data = file.read(row_count * column.row_bytes)
                if column.name == name:
                    return np.frombuffer(data, column.dtype).reshape(row_count, *column.row_shape)
        raise KeyError(name)


class PartBuilder:
    """Gathers the results of items until they are enough for a part."""

    def __init__(
        self, *, max_item_count: int, keep: tuple[str, ...], accept: Callable[[tuple[Column, ...]], None]
    ) -> None:
        """Starts an empty part; `keep` names the kept values, and `accept` raises if the output cannot hold columns."""
        self._max_item_count = max_item_count
        self._accept = accept
        self._labels: dict[str, list[Value]] = {name: [] for name in (IDS, *keep)}
        self.bad: list[BadItem] = []
        self._arrays: dict[str, list[Array]] = {}
        self._columns: tuple[Column, ...] = ()
        self._byte_count = 0

    @property
    def text_count(self) -> int:
        """How many good items it has."""
        return len(self._labels[IDS])

    @property
    def item_count(self) -> int:
        """How many items it has."""
        return self.text_count + len(self.bad)

    @property
    def is_full(self) -> bool:
        """Whether it is enough for a part."""
        return self.item_count >= self._max_item_count or self._byte_count >= MAX_PART_BYTES

    def add(self, item: Item, columns: tuple[Column, ...], arrays: list[Array]) -> None:
        """Adds the rows that each column has of an item."""
        if columns != self._columns:
            if self._columns:
                raise JobError(f"item {item.number} came with other arrays than those before it; remove the parts")
            self._accept(columns)
            self._columns = columns
        for name, value in zip(self._labels, (item.id, *item.kept), strict=True):
            self._labels[name].append(value)
            self._byte_count += len(value) if isinstance(value, str) else 8
        for column, array in zip(columns, arrays, strict=True):
            self._arrays.setdefault(column.name, []).append(array)
            self._byte_count += array.nbytes

    def add_bad(self, item: BadItem) -> None:
        """Adds an item without a result."""
        self.bad.append(item)

    def write(self, path: Path, digest: str) -> Part:
        """Writes it, as a whole or not at all; digest is the sum over all items up to its end."""
        part = Part(
            path=path,
            item_count=self.item_count,
            bad_count=len(self.bad),
            digest=digest,
            columns=self._columns,
            row_counts=tuple(sum(map(len, self._arrays[column.name])) for column in self._columns),
            labels=tuple(Label.of(name, values) for name, values in self._labels.items()),
        )
        facts = {name: value for name, value in dataclasses.asdict(part).items() if name != "path"}
        head = {"facts": facts, "labels": self._labels, "bad": list(map(dataclasses.asdict, self.bad))}
        arrays = (
            np.ascontiguousarray(array, column.dtype).reshape(-1).view(np.uint8).data
            for column in self._columns
            for array in self._arrays[column.name]
        )
        atomic_files.write_sealed(path, LAYOUT, [json.dumps(head).encode() + b"\n", *arrays])
        return part


def _head(path: Path) -> dict[str, Any]:
    """Returns the first line of a part: its facts, its ids and kept values as `labels`, and its bad items."""
    with path.open("rb") as file:
        file.readline()
        head: dict[str, Any] = json.loads(file.readline())
    return head
