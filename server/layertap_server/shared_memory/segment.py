"""Memory that the server shares with callers on its host: segments, the blocks in them, and when blocks are free again.

A segment is a memfd: it has no name in any file system, so nothing remains when either side ends, and it is sealed, so
that a caller cannot shrink it while the server uses it. Each caller has its own; `ShareMemoryResponse` in the contract
describes it. Rules:

- Nothing waits. Where there is no room, `allocate` returns None and the rows travel as bytes.
- The server trusts only its own tables. The flags of a caller can free only blocks that were sent to that caller, in
  its own segment: a caller that writes other values into the tables spoils only its own answers.
- A block is free again when the server no longer has its buffer *and* no message refers to it. So a block that is still
  being written, for example by a batch whose caller has left, is not lent a second time.

Knows neither gRPC nor protobuf nor torch.
"""

from __future__ import annotations

import bisect
import dataclasses
import fcntl
import mmap
import operator
import os
import secrets
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

Pin = Callable[[memoryview], Callable[[], None]]
"""Registers memory for direct copies from a device; returns a function that undoes it."""

UNIT: Final = 4096
"""Blocks begin at multiples of it, in bytes."""

LEAST_BYTES: Final = 32 << 10
"""Smaller payloads travel as bytes: a place in a segment costs more than a copy of them."""

SLOT_COUNT: Final = 16384
CALL_COUNT: Final = 4096
_SLOT_OFFSET: Final = UNIT
_CALL_OFFSET: Final = _SLOT_OFFSET + SLOT_COUNT
_DATA_OFFSET: Final = _CALL_OFFSET + 8 * CALL_COUNT

_TAKEN: Final = 1
_RELEASED: Final = 2


@dataclasses.dataclass(slots=True, eq=False)
class _Block:
    """A block that is not free.

    Attributes:
        start: Its first byte in the segment.
        end: The byte behind its last.
        holds: How many things use it: the server's buffer, and each message with rows in it.
    """

    start: int
    end: int
    holds: int = 1


_start = operator.attrgetter("start")


class Segment:
    """The memory shared with one caller. All methods may be called from any thread.

    Attributes:
        id: The name by which calls refer to it; a random number, so that other callers cannot guess it.
        nonce: 16 random bytes, with which it begins.
        descriptor: Its file descriptor.
        byte_count: Its size in bytes, tables included.
    """

    slot_offset, slot_count = _SLOT_OFFSET, SLOT_COUNT
    call_offset, call_count = _CALL_OFFSET, CALL_COUNT

    def __init__(self, byte_count: int, *, pin: Pin | None = None) -> None:
        """Makes a segment with room for so many bytes of rows.

        Raises:
            OSError: if the system has no such memory.
        """
        self.id = secrets.token_hex(16)
        self.nonce = secrets.token_bytes(16)
        self.byte_count = _DATA_OFFSET + -(-byte_count // UNIT) * UNIT
        self.descriptor = os.memfd_create("layertap", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.descriptor, self.byte_count)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._bytes = np.frombuffer(mmap.mmap(self.descriptor, self.byte_count), np.uint8)
            if pin is not None:
                # The array outlives `close` while a buffer in it is in use.
                weakref.finalize(self._bytes, pin(self._bytes.data)).atexit = False
        except BaseException:
            os.close(self.descriptor)
            raise
        self._bytes[: len(self.nonce)] = np.frombuffer(self.nonce, np.uint8)
        self._slots = self._bytes[_SLOT_OFFSET:_CALL_OFFSET]
        self._calls = self._bytes[_CALL_OFFSET:_DATA_OFFSET].view("<i8")
        self._address = _address(self._bytes)
        self._lock = threading.Lock()
        self._closed = False
        self._free = [(_DATA_OFFSET, self.byte_count)]
        self._blocks: list[_Block] = []
        self._let_go: deque[_Block] = deque()
        self._free_slots = deque(range(SLOT_COUNT))
        self._sent = np.zeros(SLOT_COUNT, np.bool_)
        self._messages: dict[int, tuple[Lending, list[_Block]]] = {}
        self._ended: list[Lending] = []

    def lend(self, call_number: int) -> Lending:
        """Returns the use of the segment by one call; close it when the call ends."""
        return Lending(self, call_number)

    def allocate(self, byte_count: int) -> memoryview | None:
        """Returns a buffer in the segment; None: no free block is large enough, or the lease has ended.

        Its block is in use while anything refers to the buffer, and then while messages refer to the block.
        """
        with self._lock:
            if self._closed:
                return None
            self._reclaim()
            size = -(-byte_count // UNIT) * UNIT
            # The lowest place that is large enough: pages that both sides have touched are used again first.
            n = next((n for n, (start, end) in enumerate(self._free) if end - start >= size), None)
            if n is None:
                return None
            start, end = self._free[n]
            self._free[n : n + 1] = [(start + size, end)] if end - start > size else []
            block = _Block(start, start + size)
            bisect.insort(self._blocks, block, key=_start)
            buffer = self._bytes[start : start + byte_count]
        # It may run in any thread, at any time: it takes no lock.
        weakref.finalize(buffer, self._let_go.append, block).atexit = False
        return buffer.data

    def offset_of(self, data: memoryview) -> int | None:
        """Returns the offset of a buffer in the segment; None: it is not in it, or the lease has ended."""
        if self._closed or not data.nbytes:
            return None
        offset = _address(np.frombuffer(data, np.uint8)) - self._address
        return offset if _DATA_OFFSET <= offset < self.byte_count else None

    def close(self) -> None:
        """Ends the lease. The system gets the memory back when the last buffer in it is freed."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            os.close(self.descriptor)
            self._bytes = self._slots = np.empty(0, np.uint8)
            self._calls = np.empty(0, np.int64)
            self._messages.clear()
            self._ended.clear()

    def send(self, lending: Lending, offsets: Sequence[int]) -> int | None:
        """Notes that a message refers to the blocks at some offsets, each of which a buffer still uses.

        Returns:
            The slot whose flag the caller sets when it has read the rows; None: no slot is free, or the lease has
            ended.
        """
        with self._lock:
            if self._closed or not self._free_slots:
                return None
            blocks = [self._blocks[bisect.bisect_right(self._blocks, at, key=_start) - 1] for at in offsets]
            for block in blocks:
                block.holds += 1
            slot = self._free_slots.popleft()
            self._slots[slot] = 0
            self._sent[slot] = True
            self._messages[slot] = lending, blocks
            lending.slots.add(slot)
            return slot

    def end(self, lending: Lending) -> None:
        """Notes that a call sends nothing more."""
        with self._lock:
            if not self._closed and lending.slots:
                self._ended.append(lending)

    def _reclaim(self) -> None:
        while self._let_go:
            self._give_back(self._let_go.popleft())
        for slot in np.flatnonzero((self._slots == _RELEASED) & self._sent).tolist():
            self._forget(slot)
        still = []
        for lending in self._ended:
            # A caller that has read its last message has taken all that it will ever take.
            done = self._calls[lending.call_number % CALL_COUNT] >= lending.call_number
            if done:
                for slot in [slot for slot in lending.slots if self._slots[slot] != _TAKEN]:
                    self._forget(slot)
            elif lending.slots:
                still.append(lending)
        self._ended = still

    def _forget(self, slot: int) -> None:
        lending, blocks = self._messages.pop(slot)
        lending.slots.remove(slot)
        self._sent[slot] = False
        self._free_slots.append(slot)
        for block in blocks:
            self._give_back(block)

    def _give_back(self, block: _Block) -> None:
        block.holds -= 1
        if block.holds:
            return
        del self._blocks[bisect.bisect_left(self._blocks, block.start, key=_start)]
        start, end = block.start, block.end
        n = bisect.bisect(self._free, (start, end))
        if n < len(self._free) and self._free[n][0] == end:
            end = self._free.pop(n)[1]
        if n and self._free[n - 1][1] == start:
            n -= 1
            start = self._free.pop(n)[0]
        self._free.insert(n, (start, end))


class Lending:
    """The use of a caller's segment by one call."""

    def __init__(self, segment: Segment, call_number: int) -> None:
        self.segment = segment
        self.call_number = call_number
        self.slots: set[int] = set()
        self.kept: dict[tuple[int, int], memoryview | None] = {}
        """Buffers for the whole call, by output index and layer."""

    def allocate(self, byte_count: int) -> memoryview | None:
        """Returns a buffer in the segment; None: the payload is small, or there is no room."""
        return self.segment.allocate(byte_count) if byte_count >= LEAST_BYTES else None

    def offset_of(self, data: memoryview) -> int | None:
        """Returns the offset of a payload in the segment; None: it is not in it."""
        return self.segment.offset_of(data)

    def send(self, offsets: Sequence[int]) -> int | None:
        """Returns the slot of a message with rows at some offsets; None: the message must carry them."""
        return self.segment.send(self, offsets)

    def close(self) -> None:
        """Ends the call: what it has not sent is free, what it has sent is free when the caller has read it."""
        self.kept.clear()
        self.segment.end(self)


def _address(array: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> int:
    return int(array.__array_interface__["data"][0])
