"""What a job has done so far, on the disk: a folder of parts, and a manifest that says what they are parts of.

The parts that count are those from 0 on up to the first that is missing or damaged. The folder is known by its
manifest, also by a damaged one; nothing in a folder without one is ever touched.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from layertap.jobs import atomic_files
from layertap.jobs.items import json_line
from layertap.jobs.part import LAYOUT, Part, PartBuilder

MANIFEST: Final = "layertap-job.json"
_CLEARED: Final = "layertap-job.cleared"
"""What the manifest is called while a folder is emptied, so that it is still known, but no part of it counts."""

_LOCK: Final = "lock"
_OUTPUT: Final = "output"
_ERRORS: Final = "errors.jsonl"
_OWN: Final = re.compile(rf"(part-\d{{8}}|{_OUTPUT}|{_ERRORS}|{MANIFEST}|{_CLEARED})({atomic_files.TEMPORARY})?")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a job ended, as its manifest keeps it.

    Attributes:
        text_count: Texts in the output.
        bad_count: Items in the side file.
        digest: The sum over all items.
        stamp: What the file system said of the input; where it says the same, the input is the same.
    """

    text_count: int
    bad_count: int
    digest: str
    stamp: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What parts are parts of.

    Attributes:
        settings: All that decides the output, besides input and model.
        model_id: The name of the model.
        fingerprint: Which model it is.
        is_complete: Whether all items are done and the files are about to get their names.
        end: How the job ended, if the manifest is kept. None: it has not ended.
    """

    settings: dict[str, Any]
    model_id: str
    fingerprint: str
    is_complete: bool = False
    end: End | None = None

    def difference(self, now: Manifest) -> str:
        """Returns what a job now has otherwise, of what decides the output, as a phrase; empty: nothing."""
        if self.settings != now.settings:
            return _difference("", self.settings, now.settings)
        if self.fingerprint != now.fingerprint:
            here = f"the model {self.model_id}, fingerprint {self.fingerprint[:12]}"
            return f"{here}; the server has {now.model_id}, {now.fingerprint[:12]}"
        return ""


class Parts:
    """The folder of a job.

    Attributes:
        folder: Where it is.
        output: The output, until it gets its name.
        errors: The side file, likewise.
        manifest: What the parts are parts of; None if nothing is begun.
        done: The parts that are whole.
        damage: What was found damaged and will be done again, as a phrase; empty: nothing.
    """

    def __init__(self, folder: Path) -> None:
        """Reads what is there; the caller holds the lock."""
        self.folder = folder
        self.output = folder / _OUTPUT
        self.errors = folder / _ERRORS
        self.done: list[Part] = []
        self.damage = ""
        self.manifest = self._read_manifest()
        if self.manifest is not None and self.manifest.end is None:
            self._read_parts()
            if self.damage and self.manifest.is_complete:
                self.manifest = dataclasses.replace(self.manifest, is_complete=False)

    @property
    def is_complete(self) -> bool:
        """Whether all items are done."""
        return self.manifest is not None and self.manifest.is_complete

    @property
    def item_count(self) -> int:
        """Items done, good and bad."""
        return sum(part.item_count for part in self.done)

    @property
    def text_count(self) -> int:
        """Good items."""
        return sum(part.text_count for part in self.done)

    @property
    def digest(self) -> str | None:
        """The sum over all items done; None if there is none."""
        return self.done[-1].digest if self.done else None

    def begin(self, manifest: Manifest) -> None:
        """Removes all parts and begins those of another job."""
        self.clear()
        self.note(manifest)

    def note(self, manifest: Manifest) -> None:
        """Writes the manifest."""
        atomic_files.write_sealed(
            self.folder / MANIFEST, LAYOUT, [json.dumps(dataclasses.asdict(manifest), indent=1).encode()]
        )
        self.manifest = manifest

    def add(self, builder: PartBuilder, digest: str) -> None:
        """Writes the next part."""
        self.done.append(builder.write(self._path(len(self.done)), digest))

    def bad_lines(self) -> Iterator[bytes]:
        """Yields the lines of the side file, part by part."""
        for part in self.done:
            yield b"".join(json_line(dataclasses.asdict(bad)).encode() + b"\n" for bad in part.bad())

    def clear(self) -> None:
        """Removes all that this package wrote but the lock."""
        self.done, self.manifest = [], None
        if (self.folder / MANIFEST).exists():
            atomic_files.rename(self.folder / MANIFEST, self.folder / _CLEARED)
        for path in self._own():
            if path.name != _CLEARED:
                path.unlink()
        (self.folder / _CLEARED).unlink(missing_ok=True)

    def end(self, end: End) -> None:
        """Removes all but the manifest and the lock: the job is done, and is not to be done again."""
        assert self.manifest is not None
        if self.manifest.end != end:
            self.note(dataclasses.replace(self.manifest, is_complete=True, end=end))
        self.done = []
        for path in self._own():
            if path.name != MANIFEST:
                path.unlink()

    def remove(self) -> None:
        """Removes the folder; what this package did not write stays, and the folder with it."""
        self.clear()
        self.lock(self.folder).unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    @staticmethod
    def lock(folder: Path) -> Path:
        """Returns the file that is locked while a process works in a folder."""
        return folder / _LOCK

    @staticmethod
    def is_foreign(folder: Path) -> bool:
        """Returns whether a folder was not made for a job: no manifest lies in it, but something else.

        An empty one is as a job leaves it that is killed before it has written anything, so it is used and removed.
        """
        names = {path.name for path in folder.iterdir()}
        return not names & {MANIFEST, _CLEARED} and not names <= {_LOCK, MANIFEST + atomic_files.TEMPORARY}

    def _own(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if _OWN.fullmatch(path.name)]

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:08}"

    def _read_manifest(self) -> Manifest | None:
        path = self.folder / MANIFEST
        if not path.exists():
            return None
        if reason := atomic_files.damage(path, LAYOUT):
            self.damage = f"{path} {reason}; the whole job is done again"
            return None
        fields = json.loads(path.read_bytes().partition(b"\n")[2])
        end = fields.pop("end", None)
        return Manifest(**fields, end=None if end is None else End(**end))

    def _read_parts(self) -> None:
        while (path := self._path(len(self.done))).exists():
            if reason := atomic_files.damage(path, LAYOUT):
                self.damage = f"{path} {reason}; it and the parts after it are done again"
                return
            self.done.append(Part.read(path))


def _difference(name: str, was: Any, now: Any) -> str:
    """Returns which setting is another now; of nested ones, which part."""
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        was, now = dict(enumerate(was)), dict(enumerate(now))
    if isinstance(was, dict) and isinstance(now, dict):
        key = next(key for key in sorted(was | now) if was.get(key) != now.get(key))
        return _difference(f"{name}.{key}" if name else key, was.get(key), now.get(key))
    return f"{name} {was!r}, now it is {now!r}"
