"""Files that are there as a whole or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from layertap.jobs.refusal import JobError

TEMPORARY: str = ".tmp"
"""What ends the name of a file that is not whole yet."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that takes its name, and the place of any file of that name, once it is whole and on the disk."""
    temporary = path.with_name(path.name + TEMPORARY)
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    rename(temporary, path)


def rename(old: Path, new: Path) -> None:
    """Gives a file another name, for good."""
    os.replace(old, new)
    for folder in {old.parent, new.parent}:
        sync(folder)


def sync(folder: Path) -> None:
    """Puts the names in a folder on the disk."""
    if sys.platform == "win32":  # Which cannot, and keeps names safe itself.
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keeps other processes out as long as the context, or this process, lasts.

    Raises:
        JobError: Another process is in.
    """
    with path.open("ab") as file:
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise JobError(f"another process is at work in {path.parent}; wait for its end") from exc
        yield
