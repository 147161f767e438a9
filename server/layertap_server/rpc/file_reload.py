"""Files that are read again when they change, so that certificates and tokens are rotated without a restart.

Rules:
- Files that cannot be used change nothing: what was last read stays in force. The log says why, once for each reason.
- They are tried again when they change, and once a minute: a certificate may become valid, and a mode changes no date.
- Only regular files are read: to open a pipe might wait for ever.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

_State = tuple[tuple[int, int, int], ...]

_RETRY_S: Final = 60.0


class ReloadedFiles(Generic[T]):
    """What some files say. To be asked from any thread; a question costs a look at the files, no reading of them."""

    def __init__(
        self, what: str, paths: Sequence[str], read: Callable[[], T], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Reads the files for the first time.

        Args:
            what: What they are, for the log.
            paths: The files.
            read: Reads and checks them; raises OSError or ValueError, whose message may be logged.
            clock: Seconds that only grow.
        """
        self._what = what
        self._paths = paths
        self._read = read
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: _State | None = self._state()
        self._value = read()
        self._fault = ""
        self._retry_at = 0.0

    def get(self) -> T:
        """Returns what the files said when they were last good: the same object until they change."""
        with self._lock:
            try:
                state = self._state()
            except OSError:
                state = None  # Being replaced, or gone: as good as unreadable.
            if state == self._seen and not (self._fault and self._clock() >= self._retry_at):
                return self._value
            self._seen = state
            try:
                if state is None:
                    self._state()  # Raises the reason.
                self._value = self._read()
            except (OSError, ValueError) as exc:
                self._retry_at = self._clock() + _RETRY_S
                if (fault := str(exc)) != self._fault:
                    self._fault = fault
                    log.error("%s changed and cannot be used, the old stays in force: %s", self._what, fault)
                return self._value
            self._fault = ""
            log.info("%s changed and is in force", self._what)
            return self._value

    def _state(self) -> _State:
        found = [os.stat(path) for path in self._paths]
        for path, one in zip(self._paths, found, strict=True):
            if not stat.S_ISREG(one.st_mode):
                raise OSError(0, "it is not a regular file", path)
        return tuple((one.st_mtime_ns, one.st_size, one.st_ino) for one in found)
