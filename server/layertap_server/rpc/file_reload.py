"""Files that are read again when they change, so that certificates and tokens are rotated without a restart.

Rules:
- The files are checked twice a second, in a thread, since a file system may hang; calls and handshakes never do so. A
  change is in force in all processes of a server at about the same time, also in one without callers.
- Changed files are read once two checks have found them the same: a certificate and its key are two files.
- Files that cannot be used change nothing: what was last read stays in force. The log says why, once for each reason.
- They are tried again when they change, and once a minute: a certificate may become valid, and a mode changes no date.
- Only regular files are read: to open a pipe might wait for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
import time
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

_State = tuple[tuple[int, int, int], ...]

_INTERVAL_S: Final = 0.5
_RETRY_S: Final = 60.0


class ReloadedFiles(Generic[T]):
    """What some files say."""

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
        self._found: _State | None = self._state()
        self._tried: _State | None = self._found
        self._value = read()
        self._fault = ""
        self._retry_at = 0.0

    def get(self) -> T:
        """Returns what the files said when they were last good: the same object until they change."""
        return self._value

    async def follow(self, checked: Callable[[T], None] = lambda _: None) -> None:
        """Checks the files for ever.

        Args:
            checked: Called with what is in force, after each check.
        """
        while True:
            await asyncio.sleep(_INTERVAL_S)
            await asyncio.to_thread(self.check)
            checked(self._value)

    def check(self) -> None:
        """Reads the files if they have changed, and not since the last check. One thread at a time may call it."""
        state: _State | None = None
        with contextlib.suppress(OSError):  # Being replaced, or gone: as good as unreadable.
            state = self._state()
        before, self._found = self._found, state
        if state != before or (state == self._tried and not (self._fault and self._clock() >= self._retry_at)):
            return
        self._tried = state
        try:
            if state is None:
                self._state()  # Raises the reason.
            self._value = self._read()
        except Exception as exc:  # Whatever it is, the files are checked again.
            fault = str(exc) if isinstance(exc, (OSError, ValueError)) else type(exc).__name__
            self._retry_at = self._clock() + _RETRY_S
            if fault != self._fault:
                self._fault = fault
                log.error("%s changed and cannot be used, the old stays in force: %s", self._what, fault)
            return
        self._fault = ""
        log.info("%s changed and is in force", self._what)

    def _state(self) -> _State:
        found = [os.stat(path) for path in self._paths]
        for path, one in zip(self._paths, found, strict=True):
            if not stat.S_ISREG(one.st_mode):
                raise OSError(0, "it is not a regular file", path)
        return tuple((one.st_mtime_ns, one.st_size, one.st_ino) for one in found)
