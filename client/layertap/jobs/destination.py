"""Where a job writes: the output, the side file of bad items, and the folder of parts between.

Nothing is replaced that a job did not write, but for the output when overwriting is allowed.
"""

from __future__ import annotations

import dataclasses
import filecmp
import os
from pathlib import Path
from typing import Final

from layertap.jobs import JobError, atomic_files
from layertap.jobs.items import is_line_of_bad_item
from layertap.jobs.parts import MANIFEST, Parts
from layertap.jobs.readers import Source

_MAX_LINE_BYTES: Final = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """The files of one job.

    Attributes:
        output: The file that is made; its ending says the format.
        overwrite: Whether a file of that name, and an unfinished job of another kind, may be replaced.
        work_folder: Where parts and side file lie; the manifest stays there when the job is done, so that the same job
            does nothing. None: beside the output, and nothing stays.
    """

    output: Path
    overwrite: bool = False
    work_folder: Path | None = None

    @property
    def folder(self) -> Path:
        """Where the parts are until the job is done."""
        return self._beside / (self.output.name + ".parts")

    @property
    def errors(self) -> Path:
        """The side file, which names bad items: one JSON object a line."""
        return self._beside / (self.output.name + ".errors.jsonl")

    @property
    def _beside(self) -> Path:
        return self.output.parent if self.work_folder is None else self.work_folder

    def check(self, source: Source) -> None:
        """Raises JobError if one of the files cannot be written, or belongs to something else."""
        if not self.output.parent.is_dir():
            raise JobError(f"there is no folder {self.output.parent}; create it, or name another with -o")
        read = source.stat()
        for path in (self.output, self.errors):
            if path.is_dir():
                raise JobError(f"{path} is a folder; name a file with -o")
            if read is not None and path.exists() and os.path.samestat(read, path.stat()):
                raise JobError(f"{path} is the input itself; name another file with -o")
        if os.path.lexists(self.errors) and not is_line_of_bad_item(_first_line(self.errors)):
            raise JobError(
                f"{self.errors} was not made by this command, which needs that name; move it away, or name another "
                "file with -o"
            )
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise JobError(f"{self.folder} is not a folder of this command, which needs that name; move it away")
        if self.folder.is_dir() and Parts.is_foreign(self.folder):
            raise JobError(
                f"{self.folder} was not made by this command (it has no {MANIFEST}), which needs that name; move it "
                "away, or name another file with -o"
            )

    def check_free(self) -> None:
        """Raises JobError if a file would be replaced unasked."""
        for path in (self.output, self.errors):
            if os.path.lexists(path) and not self.overwrite:
                raise JobError(f"{path} is there already; name another file, remove it, or say --overwrite")

    def give_up(self, reason: str, *, is_done: bool = False) -> None:
        """Raises JobError unless what lies in the folder, or an output that is done, may be lost for a reason."""
        if self.overwrite:
            return
        if is_done:
            raise JobError(f"{self.output} {reason}; name another folder with -o, or say --overwrite to make it anew")
        raise JobError(
            f"{self.folder} {reason}; finish it as it was begun, or say --overwrite to lose it and begin anew"
        )

    def publish(self, parts: Parts, *, has_errors: bool) -> None:
        """Gives output and side file their names; what has its name already is passed over.

        Raises:
            JobError: if another file has come by such a name.
        """
        files = [(path, name) for path, name in ((parts.errors, self.errors), (parts.output, self.output))]
        files = [(path, name) for path, name in files if path.exists() and not _is_same(path, name)]
        if not self.overwrite and (taken := [name for _, name in files if os.path.lexists(name)]):
            raise JobError(f"{taken[0]} has come meanwhile; move it away and run the same again, or say --overwrite")
        if self.overwrite and not has_errors:
            self.errors.unlink(missing_ok=True)
        for path, name in files:
            atomic_files.rename(path, name)


def _first_line(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.readline(_MAX_LINE_BYTES)
    except OSError:
        return b""


def _is_same(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)
