"""Host memory that a device copies into without waiting, lent piece by piece.

Slabs are mapped and registered with the driver, which takes milliseconds, and then kept for reuse. Torch's own pinned
allocator rounds each piece up to a power of two and keeps all that it ever had; here a piece takes its own size, and
slabs beyond a bound are given back once nothing of them is lent. The pool itself has no limit: what is lent are rows
of answers, and the scheduler reserves their bytes before a batch starts.
"""

from __future__ import annotations

import bisect
import contextlib
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Final

import numpy as np

_ALIGNMENT: Final = 256
_SLAB_BYTES: Final = 64 << 20
_KEPT_BYTES: Final = 4 << 30
"""Unused slabs are kept up to here."""

Register = Callable[[memoryview], Callable[[], None]]
"""Registers memory with the driver; returns what undoes that."""


class _Slab:
    """One mapping and its free ranges: starts and ends, ascending, never touching each other."""

    def __init__(self, byte_count: int, register: Register) -> None:
        self.byte_count = byte_count
        mapping = mmap.mmap(-1, byte_count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Where the kernel has them, large pages are registered in a tenth of the time.
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        self.memory = memoryview(mapping)
        self.unregister = register(self.memory)
        self._starts, self._ends = [0], [byte_count]

    @property
    def unused(self) -> bool:
        return self._starts == [0] and self._ends == [self.byte_count]

    def take(self, byte_count: int) -> int | None:
        """Returns where a piece starts, in the first range that is large enough; None: there is none."""
        for n, (start, end) in enumerate(zip(self._starts, self._ends, strict=True)):
            if end - start >= byte_count:
                self._starts[n] += byte_count
                if self._starts[n] == end:
                    del self._starts[n], self._ends[n]
                return start
        return None

    def give_back(self, start: int, byte_count: int) -> None:
        """Frees a piece, and joins it with the free ranges that it touches."""
        end, n = start + byte_count, bisect.bisect(self._starts, start)
        if n < len(self._starts) and self._starts[n] == end:
            end = self._ends[n]
            del self._starts[n], self._ends[n]
        if n and self._ends[n - 1] == start:
            self._ends[n - 1] = end
        else:
            self._starts.insert(n, start)
            self._ends.insert(n, end)


class PinnedMemory:
    """Pinned host memory of one device. Safe to use from any thread.

    Args:
        register: Registers a slab with the driver.
        slab_bytes: The size of a slab; a larger piece gets one of its own.
        kept_bytes: How many bytes of unused slabs are kept.
    """

    def __init__(self, register: Register, *, slab_bytes: int = _SLAB_BYTES, kept_bytes: int = _KEPT_BYTES) -> None:
        self._register = register
        self._slab_bytes = slab_bytes
        self._kept_bytes = kept_bytes
        self._slabs: list[_Slab] = []
        self._lock = threading.Lock()
        # A piece may lose its last reference anywhere, also where the lock is held; so it is only noted then.
        self._returned: deque[tuple[_Slab, int, int]] = deque()

    @property
    def byte_count(self) -> int:
        """The bytes of all slabs."""
        with self._lock:
            self._collect()
            return sum(slab.byte_count for slab in self._slabs)

    def allocate(self, byte_count: int) -> memoryview:
        """Returns a writable piece, which is free again once nothing refers to it any more."""
        if not byte_count:
            return memoryview(bytearray())
        taken = -(-byte_count // _ALIGNMENT) * _ALIGNMENT
        with self._lock:
            self._collect()
            slab, start = self._take(taken)
        piece = np.frombuffer(slab.memory[start : start + byte_count], np.uint8)
        weakref.finalize(piece, self._returned.append, (slab, start, taken)).atexit = False
        return piece.data

    def _take(self, byte_count: int) -> tuple[_Slab, int]:
        for slab in self._slabs:
            if (start := slab.take(byte_count)) is not None:
                return slab, start
        slab = _Slab(max(byte_count, self._slab_bytes), self._register)
        self._slabs.append(slab)
        start = slab.take(byte_count)
        assert start is not None
        return slab, start

    def _collect(self) -> None:
        while self._returned:
            slab, start, byte_count = self._returned.popleft()
            slab.give_back(start, byte_count)
            if slab.unused and sum(one.byte_count for one in self._slabs if one.unused) > self._kept_bytes:
                self._slabs.remove(slab)
                slab.unregister()
