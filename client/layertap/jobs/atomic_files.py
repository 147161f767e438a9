"""Files that exist as a whole or not at all, whenever the process or the machine stops; and the lock of a folder.

A sealed file begins with its checksum.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from layertap.jobs import JobError

_HEADER: Final = re.compile(rb"layertap job (\d+) ([0-9a-f]{64})\n")
_MAX_HEADER_BYTES: Final = 1 << 10

TEMPORARY: Final = ".tmp"
"""The suffix of a file that is not whole yet."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that takes its name, and replaces a file of that name, once it is whole and on the disk."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as exc:
        # A full disk does not say which it is.
        exc.filename = exc.filename or str(temporary)
        raise
    rename(temporary, path)


def rename(old: Path, new: Path) -> None:
    """Renames a file and makes the new name durable."""
    os.replace(old, new)
    for folder in {old.parent, new.parent}:
        sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Writes the names in a folder to the disk, where the file system can: some of networks cannot."""
    if sys.platform == "win32":  # Folders cannot be opened there, and the file system keeps names safe itself.
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file against other processes as long as the context, or this process, lasts.

    Raises:
        JobError: if another process holds it.
        OSError: if the file system has no locks.
    """
    with path.open("ab") as file:
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as exc:
            raise JobError(f"another process works in {path.parent}; wait until it ends") from exc
        except OSError as exc:
            exc.filename = str(path)
            raise
        yield


def write_sealed(path: Path, layout: int, pieces: list[bytes | memoryview]) -> None:
    """Writes a file whose first line names its layout and its checksum."""
    checksum = hashlib.sha256()
    for piece in pieces:
        checksum.update(piece)
    with writing(path) as file:
        file.write(f"layertap job {layout} {checksum.hexdigest()}\n".encode())
        for piece in pieces:
            file.write(piece)


def damage(path: Path, layout: int) -> str:
    """Returns why a file is not as `write_sealed` wrote it, as a phrase; empty: it is."""
    with path.open("rb") as file:
        header = _HEADER.fullmatch(file.readline(_MAX_HEADER_BYTES))
        if header is None:
            return "is damaged"
        if int(header[1]) != layout:
            return "is of another version of layertap"
        checksum = hashlib.file_digest(file, "sha256")
    return "" if checksum.hexdigest().encode() == header[2] else "is damaged (its checksum differs)"
