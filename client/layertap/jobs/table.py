"""All parts of a job as one table: its columns from end to end, or its rows block by block. Holds one block at most."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final

import numpy as np

from layertap.jobs.npy import Array, Member
from layertap.jobs.parts import Column, Parts

IDS: Final = "ids"

_BLOCK_BYTES: Final = 8 << 20
_BLOCK_TEXTS: Final = 16_384
"""Small parts are put together up to this, so that files of many rows do not come in crumbs."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Some texts that follow each other.

    Attributes:
        ids: Integers, or strings.
        arrays: The rows of these texts in each column.
    """

    ids: list[int] | list[str]
    arrays: dict[str, Array]


class Table:
    """What a job has made of its good items, in order."""

    def __init__(self, parts: Parts) -> None:
        """Takes parts of which at least one has a good item."""
        self._parts = parts
        self._numbers = [n for n, facts in enumerate(parts.facts) if facts.text_count]
        facts = [parts.facts[n] for n in self._numbers]
        self.columns: tuple[Column, ...] = facts[0].columns
        self.text_count = sum(one.text_count for one in facts)
        self.ids_are_integers = all(one.ids_are_integers for one in facts)
        self._id_bytes = sum(one.id_bytes for one in facts)
        self._id_characters = max(one.id_characters for one in facts)

    @property
    def metadata(self) -> dict[str, str]:
        """What tells, in a file, which model the numbers are of."""
        manifest = self._parts.manifest
        assert manifest is not None
        return {"model_id": manifest.model_id, "fingerprint": manifest.fingerprint}

    def members(self) -> list[Member]:
        """Returns all columns, each from end to end; without ids."""
        return [self._member(n, column) for n, column in enumerate(self.columns)]

    def ids(self) -> Member:
        """Returns the ids as one array, of integers or of strings. Shape: [text_count]."""
        dtype = np.dtype(np.int64) if self.ids_are_integers else np.dtype(f"<U{max(1, self._id_characters)}")
        return Member(
            name=IDS,
            dtype=dtype,
            shape=(self.text_count,),
            pieces=lambda: (np.array(ids, dtype) for ids in self._all_ids()),
        )

    def ids_as_bytes(self) -> list[Member]:
        """Returns ids of strings for files that have none: all of them in UTF-8, and where each ends.

        Shapes: [byte_count] and [text_count].
        """

        def data() -> Iterator[Array]:
            return (np.frombuffer("".join(map(str, ids)).encode(), np.uint8) for ids in self._all_ids())

        def ends() -> Iterator[Array]:
            end = 0
            for ids in self._all_ids():
                ends = end + np.cumsum([len(str(one).encode()) for one in ids], dtype=np.int64)
                end = int(ends[-1])
                yield ends

        return [
            Member(name="ids_utf8", dtype=np.dtype(np.uint8), shape=(self._id_bytes,), pieces=data),
            Member(name="ids_ends", dtype=np.dtype(np.int64), shape=(self.text_count,), pieces=ends),
        ]

    def blocks(self) -> Iterator[Block]:
        """Yields all texts, block by block."""
        held: list[int] = []
        size = texts = 0
        for number in self._numbers:
            facts = self._parts.facts[number]
            part_bytes = sum(
                rows * np.dtype(column.dtype).itemsize * int(np.prod(column.row_shape))
                for rows, column in zip(facts.row_counts, facts.columns, strict=True)
            )
            if held and (size + part_bytes > _BLOCK_BYTES or texts + facts.text_count > _BLOCK_TEXTS):
                yield self._block(held)
                held, size, texts = [], 0, 0
            held.append(number)
            size += part_bytes
            texts += facts.text_count
        yield self._block(held)

    def _block(self, numbers: list[int]) -> Block:
        ids = [one for number in numbers for one in self._parts.ids(number)]
        return Block(
            ids=[int(one) for one in ids] if self.ids_are_integers else [str(one) for one in ids],
            arrays={
                column.name: _joined([self._parts.array(number, column.name) for number in numbers])
                for column in self.columns
            },
        )

    def _member(self, position: int, column: Column) -> Member:
        row_count = sum(self._parts.facts[number].row_counts[position] for number in self._numbers)
        return Member(
            name=column.name,
            dtype=np.dtype(column.dtype),
            shape=(row_count, *column.row_shape),
            pieces=lambda: (self._parts.array(number, column.name) for number in self._numbers),
        )

    def _all_ids(self) -> Iterator[list[int | str]]:
        return (self._parts.ids(number) for number in self._numbers)


def _joined(arrays: list[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
