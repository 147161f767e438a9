"""Standard output and standard error whose writes never wait, so that an unread pipe or a full disk delays no call.

A thread writes what is printed and logged; what it has not yet written is bounded. Lines above the bound and lines that
cannot be written are dropped and counted. Lines of up to 4 KiB stay whole in a pipe that other processes write to too.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import select
import sys
import threading
from collections.abc import Iterator
from typing import Final

_MAX_PENDING: Final = 4096
"""How many writes may wait; a write is a line of the log, with its traceback if it has one."""
_MAX_CHUNK_BYTES: Final = 1 << 16
"""How much is handed to the system at once, and the most of one write."""
_DRAIN_S: Final = 0.4
"""How long `drain` may take, in seconds."""


class BoundedStream(io.TextIOBase):
    """A text stream over a file descriptor."""

    def __init__(self, descriptor: int, *, max_pending: int = _MAX_PENDING) -> None:
        """Starts the thread that writes to a descriptor, which stays open."""
        self.dropped_line_count = 0
        self._descriptor = descriptor
        self._max_pending = max_pending
        # Signal handlers write and flush too: neither may wait for a lock that the interrupted code holds.
        self._pending: queue.SimpleQueue[bytes | threading.Event] = queue.SimpleQueue()
        self._lock = threading.RLock()
        threading.Thread(target=self._write_pending, name="standard stream", daemon=True).start()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # typeshed has it as an attribute
        """The encoding: UTF-8."""
        return "utf-8"

    def fileno(self) -> int:
        """Returns the descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Returns whether the descriptor is a terminal."""
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        """Returns True."""
        return True

    def write(self, text: str) -> int:
        """Queues a text, or drops it; returns its length."""
        data = text.encode("utf-8", "backslashreplace")
        if len(data) > _MAX_CHUNK_BYTES:  # What is printed next still begins a line.
            data = data[: _MAX_CHUNK_BYTES - 1] + b"\n"
        if self._pending.qsize() >= self._max_pending:
            self._drop(data)
        else:
            self._pending.put(data)
        return len(text)

    def flush(self) -> None:
        """Does nothing: what is queued is being written, and logging flushes after each line."""

    def drain(self) -> None:
        """Waits until all is written that was queued before, but not longer than 0.4 s."""
        written = threading.Event()
        self._pending.put(written)
        written.wait(_DRAIN_S)

    def _write_pending(self) -> None:
        while True:
            chunks: list[bytes] = []
            size, written = 0, None
            while written is None and size < _MAX_CHUNK_BYTES and (not chunks or not self._pending.empty()):
                one = self._pending.get()
                if isinstance(one, bytes):
                    chunks.append(one)
                    size += len(one)
                else:
                    written = one
            self._write_all(b"".join(chunks))
            if written is not None:
                written.set()

    def _write_all(self, data: bytes) -> None:
        while data:
            # The system takes so much as one piece, or waits: what other processes write comes before it or after it.
            end = data.rfind(b"\n", 0, select.PIPE_BUF) + 1 or data.find(b"\n") + 1 or len(data)
            try:
                data = data[os.write(self._descriptor, data[:end]) :]
            except BlockingIOError:  # Another process that has the same terminal or pipe open can set this.
                select.select([], [self._descriptor], [])
            except OSError:
                self._drop(data)
                return

    def _drop(self, data: bytes) -> None:
        with self._lock:
            self.dropped_line_count += data.count(b"\n")


def dropped_line_count() -> int:
    """Returns how many lines standard output and standard error have dropped."""
    streams = (sys.stdout, sys.stderr)
    return sum(one.dropped_line_count for one in streams if isinstance(one, BoundedStream))


def open_descriptors() -> None:
    """Makes standard streams that are closed the null device.

    Else the next file or connection would get their number, and what is printed.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


@contextlib.contextmanager
def bounded_streams() -> Iterator[None]:
    """Replaces standard output and standard error in a `with` block."""
    before = sys.stdout, sys.stderr
    bounded = BoundedStream(1), BoundedStream(2)
    sys.stdout, sys.stderr = bounded
    try:
        yield
    finally:
        for stream in bounded:
            stream.drain()
        sys.stdout, sys.stderr = before
