"""Files that are read again when they change, so that certificates and tokens are rotated without a restart.

A file that cannot be read, or is half-written, changes nothing: what was last read stays in force, and the log says
why, once for each state of the files.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

_State = tuple[tuple[int, int, int], ...]


class ReloadedFiles(Generic[T]):
    """What some files say. To be asked from any thread; a question costs a look at the files, no reading of them."""

    def __init__(self, what: str, paths: Sequence[str], read: Callable[[], T]) -> None:
        """Reads the files for the first time.

        Args:
            what: What they are, for the log.
            paths: The files.
            read: Reads and checks them; raises OSError or ValueError, whose message may be logged.
        """
        self._what = what
        self._paths = paths
        self._read = read
        self._lock = threading.Lock()
        self._seen: _State | None = self._state()
        self._value = read()

    def get(self) -> T:
        """Returns what the files said when they were last good."""
        return self._refresh()[0]

    def changed(self) -> T | None:
        """Returns what the files say if that is new since the last look; else None."""
        value, new = self._refresh()
        return value if new else None

    def _refresh(self) -> tuple[T, bool]:
        with self._lock:
            try:
                state = self._state()
            except OSError:
                state = None  # Being replaced, or gone: as good as unreadable.
            if state == self._seen:
                return self._value, False
            self._seen = state
            try:
                value = self._read()
            except (OSError, ValueError) as exc:
                log.error("%s changed and cannot be used, the old stays in force: %s", self._what, exc)
                return self._value, False
            self._value = value
            log.info("%s changed and is in force", self._what)
            return value, True

    def _state(self) -> _State:
        found = [os.stat(path) for path in self._paths]
        return tuple((one.st_mtime_ns, one.st_size, one.st_ino) for one in found)
