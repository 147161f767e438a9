"""A corpus of many files: each becomes a file of its own in one folder, and what is finished is not done again.

What a job needs beside its output lies in the folder `_layertap` there, which Spark and readers of Parquet pass over:
parts of what is under way, side files, and the manifest of each file that is done. Several processes may work on one
corpus, each on a share of the files; two that take the same file do it no harm, because each file has its lock.
"""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from layertap.jobs import JobError
from layertap.jobs.destination import Destination
from layertap.jobs.readers import COMPRESSED, FORMATS

WORK: Final = "_layertap"
"""The folder beside the outputs."""

OUTPUTS: Final = ("parquet", "arrow", "npz", "npy", "safetensors")
"""The formats of outputs, as their names end."""

_PATTERN: Final = frozenset("*?[")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file of a corpus, and what it becomes."""

    source: Path
    output: Path

    def destination(self, *, overwrite: bool) -> Destination:
        """Returns where its job writes."""
        return Destination(output=self.output, overwrite=overwrite, work_folder=self.output.parent / WORK)


def is_pattern(name: str) -> bool:
    """Returns whether a name stands for the files that match it: it has a `*`, `?` or `[`, and no file is called so."""
    return not _PATTERN.isdisjoint(name) and not os.path.exists(name)


def find(names: Iterable[str]) -> list[Path]:
    """Returns the files that names stand for, in the order of their paths, each once.

    Names are files, folders, and patterns such as `corpus/**/*.parquet`. Of a folder, files whose names begin with a
    dot or an underscore do not count, nor folders in it.

    Raises:
        JobError: if a name stands for nothing.
    """
    found: set[Path] = set()
    for name in names:
        path = Path(name)
        if is_folder := os.path.isdir(name):  # Unlike that of Path, it takes a name that is too long.
            some = [one for one in path.iterdir() if one.is_file() and not one.name.startswith((".", "_"))]
        elif is_pattern(name):
            some = [one for one in map(Path, glob.iglob(name, recursive=True)) if one.is_file()]
        else:
            some = [path] if os.path.isfile(name) else []
        if not some:
            raise JobError(f"there is no file in {name}" if is_folder else f"there is no file {name}")
        found.update(some)
    return sorted(found)


def assign(sources: Iterable[Path], folder: Path, *, suffix: str) -> list[Shard]:
    """Returns each file with its output in a folder; `suffix` is one of `OUTPUTS`.

    Raises:
        JobError: if two would become the same file, or one lies where the outputs do.
    """
    shards = [Shard(source=one, output=folder / f"{_stem(one)}.{suffix}") for one in sources]
    sources_of: dict[Path, Path] = {}
    for shard in shards:
        if (other := sources_of.setdefault(shard.output, shard.source)) != shard.source:
            raise JobError(f"{other} and {shard.source} would both become {shard.output}; name one anew")
        if folder.is_dir() and shard.source.parent.samefile(folder):
            raise JobError(f"{shard.source} lies in {folder}, where the outputs would be; name another folder with -o")
    return shards


def prepare(folder: Path) -> None:
    """Makes the folder of the outputs if it is not there, or raises JobError if it cannot be one."""
    if not folder.is_dir() and (folder.exists() or folder.suffix.removeprefix(".") in OUTPUTS):
        raise JobError(f"{folder} names one file, and each file becomes its own; name a folder with -o")
    if not folder.parent.is_dir():
        raise JobError(f"there is no folder {folder.parent}; create it, or name another with -o")
    (folder / WORK).mkdir(parents=True, exist_ok=True)


def _stem(path: Path) -> str:
    name = path.name.removesuffix(COMPRESSED)
    stem, _, ending = name.rpartition(".")
    return stem if stem and ending in FORMATS else name
