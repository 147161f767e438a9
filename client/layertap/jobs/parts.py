"""What a job has done so far, on the disk: a folder of parts and a manifest that says what they are parts of.

A part holds what came of a run of items: arrays, ids, bad items. It is closed by count or size, which the items alone
decide, so parts are the same wherever a job was broken off. It is written once, as a whole. The parts that count are
those from 0 on without a gap.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from layertap.jobs import atomic_files, npy
from layertap.jobs.npy import Array
from layertap.jobs.readers import BadItem, Item
from layertap.jobs.refusal import JobError

LAYOUT: Final = 1
"""The number of this layout of parts; a job begun in another one is not taken up."""

MAX_PART_BYTES: Final = 16 << 20
"""A part that has as much is closed."""

_MANIFEST: Final = "manifest.json"
_LOCK: Final = "lock"
_FACTS, _IDS, _BAD = "facts.json", "ids.json", "bad.jsonl"


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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What one needs to know of a part without opening it again.

    Attributes:
        item_count: Good and bad items.
        bad_count: Bad ones.
        digest: The sum over all items up to its end.
        columns: Its arrays; none if all items are bad.
        row_counts: The rows of each of them.
        id_characters: Those of the longest id.
        id_bytes: Of all ids in UTF-8, one after the other.
        ids_are_integers: Whether all ids are whole numbers of 64 bits.
    """

    item_count: int
    bad_count: int
    digest: str
    columns: tuple[Column, ...]
    row_counts: tuple[int, ...]
    id_characters: int
    id_bytes: int
    ids_are_integers: bool

    @property
    def text_count(self) -> int:
        """Good items."""
        return self.item_count - self.bad_count


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a job ended.

    Attributes:
        text_count: Texts in the output.
        bad_count: Items in the side file.
        shapes: The shape of each column, all texts together.
    """

    text_count: int
    bad_count: int
    shapes: dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What parts are parts of.

    Attributes:
        settings: All that decides what comes out, besides input and model.
        model_id: The name of the model.
        fingerprint: Which model it is.
        outcome: How the job ended, once output and side file are whole, and have their names or are about to.
    """

    settings: dict[str, Any]
    model_id: str
    fingerprint: str
    outcome: Outcome | None = None


class PartBuilder:
    """Gathers what comes of items until it is enough for a part."""

    def __init__(self, *, max_item_count: int, accept: Callable[[tuple[Column, ...]], None]) -> None:
        """Takes how many items a part has at most, and what refuses columns that the output cannot hold."""
        self._max_item_count = max_item_count
        self._accept = accept
        self._ids: list[int | str] = []
        self._bad: list[BadItem] = []
        self._arrays: dict[str, list[Array]] = {}
        self._columns: tuple[Column, ...] = ()
        self._byte_count = 0

    @property
    def item_count(self) -> int:
        """How many items it has."""
        return len(self._ids) + len(self._bad)

    @property
    def is_full(self) -> bool:
        """Whether it is enough for a part."""
        return self.item_count >= self._max_item_count or self._byte_count >= MAX_PART_BYTES

    def add(self, item: Item, columns: tuple[Column, ...], arrays: list[Array]) -> None:
        """Takes what came of an item: the rows of each column."""
        if columns != self._columns:
            if self._columns:
                raise JobError(f"item {item.number} came with other arrays than those before it; remove the parts")
            self._accept(columns)
            self._columns = columns
        self._ids.append(item.id)
        for column, array in zip(columns, arrays, strict=True):
            self._arrays.setdefault(column.name, []).append(array)
            self._byte_count += array.nbytes

    def add_bad(self, item: BadItem) -> None:
        """Takes an item of which nothing came."""
        self._bad.append(item)

    def facts(self, digest: str) -> Facts:
        """Returns what is in it; digest is the sum over all items up to its end."""
        names = [str(one) for one in self._ids]
        return Facts(
            item_count=self.item_count,
            bad_count=len(self._bad),
            digest=digest,
            columns=self._columns,
            row_counts=tuple(sum(map(len, self._arrays[column.name])) for column in self._columns),
            id_characters=max(map(len, names), default=0),
            id_bytes=sum(len(name.encode()) for name in names),
            ids_are_integers=all(isinstance(one, int) and -(2**63) <= one < 2**63 for one in self._ids),
        )

    def write(self, path: Path, facts: Facts) -> None:
        """Writes it, as a whole or not at all."""
        members = [
            npy.Member(
                name=column.name,
                dtype=np.dtype(column.dtype),
                shape=(row_count, *column.row_shape),
                pieces=self._arrays[column.name].__iter__,
            )
            for column, row_count in zip(facts.columns, facts.row_counts, strict=True)
        ]
        lines = "".join(json.dumps(dataclasses.asdict(bad), ensure_ascii=False) + "\n" for bad in self._bad)
        texts = {_FACTS: json.dumps(dataclasses.asdict(facts)), _IDS: json.dumps(self._ids), _BAD: lines}
        with atomic_files.writing(path) as file:
            npy.write_npz(file, members, extra={name: text.encode() for name, text in texts.items()})


class Parts:
    """The folder of a job.

    Attributes:
        folder: Where it is.
        output: The output, from when it is whole until it gets its name.
        errors: The side file, likewise.
        manifest: What the parts are parts of; None if nothing is begun.
        facts: What is in each part.
    """

    def __init__(self, folder: Path) -> None:
        """Reads what is there; the caller keeps others out."""
        self.folder = folder
        self.output = folder / "output"
        self.errors = folder / "errors.jsonl"
        self.manifest = self._read_manifest()
        self.facts: list[Facts] = []
        while self.manifest is not None and (path := self._path(len(self.facts))).exists():
            self.facts.append(_read_facts(path))

    @property
    def outcome(self) -> Outcome | None:
        """How the job ended; None while it has not."""
        return None if self.manifest is None else self.manifest.outcome

    @property
    def item_count(self) -> int:
        """Items done, good and bad."""
        return sum(facts.item_count for facts in self.facts)

    @property
    def digest(self) -> str | None:
        """The sum over all items done; None if there is none."""
        return self.facts[-1].digest if self.facts else None

    def begin(self, manifest: Manifest) -> None:
        """Forgets all parts and begins those of another job."""
        self.clear()
        self.note(manifest)

    def note(self, manifest: Manifest) -> None:
        """Writes the manifest anew."""
        with atomic_files.writing(self.folder / _MANIFEST) as file:
            file.write(json.dumps({"layout": LAYOUT, **dataclasses.asdict(manifest)}, indent=1).encode())
        self.manifest = manifest

    def add(self, builder: PartBuilder, digest: str) -> None:
        """Writes the next part."""
        facts = builder.facts(digest)
        builder.write(self._path(len(self.facts)), facts)
        self.facts.append(facts)

    def ids(self, part: int) -> list[int | str]:
        """Returns the ids of one part."""
        with zipfile.ZipFile(self._path(part)) as archive:
            ids: list[int | str] = json.loads(archive.read(_IDS))
        return ids

    def array(self, part: int, name: str) -> Array:
        """Returns one array of one part."""
        with zipfile.ZipFile(self._path(part)) as archive, archive.open(name + ".npy") as file:
            array: Array = np.lib.format.read_array(file, allow_pickle=False)
        return array

    def bad_lines(self) -> Iterator[bytes]:
        """Yields the lines on bad items, part by part."""
        for part, facts in enumerate(self.facts):
            if facts.bad_count:
                with zipfile.ZipFile(self._path(part)) as archive:
                    yield archive.read(_BAD)

    def clear(self) -> None:
        """Removes all that is its own from the folder, the manifest first: parts without one are nobody's."""
        self.facts, self.manifest = [], None
        own = [*self.folder.glob("part-*"), *self.folder.glob("*" + atomic_files.TEMPORARY), self.output, self.errors]
        for path in [self.folder / _MANIFEST, *own]:
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes the folder; what is not its own stays, and the folder with it."""
        self.clear()
        (self.folder / _LOCK).unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    @staticmethod
    def lock(folder: Path) -> Path:
        """Returns the file by which others are kept out."""
        return folder / _LOCK

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:08}.npz"

    def _read_manifest(self) -> Manifest | None:
        try:
            fields = json.loads((self.folder / _MANIFEST).read_bytes())
        except FileNotFoundError:
            return None
        if fields.pop("layout") != LAYOUT:
            raise JobError(f"{self.folder} was begun by another version of layertap; end it with that, or remove it")
        outcome = fields.pop("outcome")
        return Manifest(**fields, outcome=None if outcome is None else Outcome(**outcome))


def _read_facts(path: Path) -> Facts:
    try:
        with zipfile.ZipFile(path) as archive:
            fields = json.loads(archive.read(_FACTS))
    except (zipfile.BadZipFile, KeyError, ValueError) as exc:
        raise JobError(f"{path} is damaged; remove it and all parts after it, and they will be made again") from exc
    columns = tuple(Column(**{**one, "row_shape": tuple(one["row_shape"])}) for one in fields.pop("columns"))
    return Facts(columns=columns, row_counts=tuple(fields.pop("row_counts")), **fields)
