"""Memory that a server on the same host shares: the mapping, what calls read from it, and how it gets it back.

`ShareMemoryResponse` in the contract describes a segment. Rules:

- Giving back is a store of one byte into the mapping. It happens when the last array of a message is collected, so in
  any thread and at any time: no lock, no call, nothing that can fail.
- Arrays hold the mapping, not the client: they outlive `close` and the server.
- A forked child never gives back what its parent holds.

No I/O but opening and mapping; what to ask the server is in `session`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import threading

import numpy as np

from layertap import wire
from layertap.errors import DataLossError
from layertap.v1 import embedding_pb2 as pb


class SharedMemory:
    """What a client knows of the memory that its server shares with it.

    Attributes:
        wanted: Whether the client asks for it at all.
        byte_count: Bytes of rows that have come through it, all calls together.
    """

    def __init__(self, *, wanted: bool) -> None:
        """Asks for it only if it is `wanted`."""
        self.wanted = wanted
        self.byte_count = 0
        self._lock = threading.Lock()

    def count(self, byte_count: int) -> None:
        """Adds what has come."""
        with self._lock:
            self.byte_count += byte_count


class Mapping:
    """A segment, mapped into this process."""

    def __init__(self, segment: pb.ShareMemoryResponse, memory: SharedMemory) -> None:
        """Opens and maps it.

        Raises:
            OSError: if the segment is missing, or is not the one that the server describes; the message says why.
        """
        self.segment_id = segment.segment_id
        self.memory = memory
        self.pid = os.getpid()
        self._bytes = _map(segment)
        slots_end = segment.slot_offset + segment.slot_count
        self.slots = self._bytes[segment.slot_offset : slots_end].data
        self._calls = self._bytes[segment.call_offset : segment.call_offset + 8 * segment.call_count].view("<i8")
        self._data_offset = max(slots_end, segment.call_offset + 8 * segment.call_count)
        self._address = wire.address(self._bytes)
        self._lock = threading.RLock()  # Garbage that is collected under it may be a call, which takes it to end.
        self._number = 0
        self._open: set[int] = set()

    def begin(self) -> SharedCall | None:
        """Returns the part that one call has in it, to be ended when the call is over; None if too many are open."""
        with self._lock:
            places = len(self._calls)
            if len(self._open) == places:
                return None
            self._number += 1
            while self._number % places in self._open:
                self._number += 1
            number = self._number
            self._open.add(number % places)
        return SharedCall(self, number)

    def end(self, number: int) -> None:
        """Reports that a call reads nothing more."""
        with self._lock:
            self._open.discard(number % len(self._calls))
            self._calls[number % len(self._calls)] = number

    def rows(self, message: _Message, offset: int, byte_count: int) -> wire.ByteArray:
        """Returns bytes of the segment as an array that holds on to its message.

        Raises:
            DataLossError: if they lie outside the segment.
        """
        if not self._data_offset <= offset <= len(self._bytes) - byte_count or offset % 4 or byte_count < 0:
            raise DataLossError("the answer names a place outside the shared memory; ask again")
        self.memory.count(byte_count)
        return wire.array_at(message, self._address + offset, byte_count)


class SharedCall:
    """What one call reads from the segment."""

    def __init__(self, mapping: Mapping, number: int) -> None:
        self._mapping = mapping
        self._number = number

    @property
    def use(self) -> pb.SharedMemoryUse:
        """What the call's options say of it."""
        return pb.SharedMemoryUse(segment_id=self._mapping.segment_id, call_number=self._number)

    def take(self, shared: pb.SharedRows) -> _Message:
        """Returns access to the rows of a message that lie in the segment.

        Raises:
            DataLossError: if the message names no slot.
        """
        if not 0 <= shared.slot < len(self._mapping.slots):
            raise DataLossError("the answer names a slot that is not there; ask again")
        return _Message(self._mapping, shared.slot)

    def end(self) -> None:
        """Reports that the call reads nothing more; the rows that it has taken stay valid."""
        self._mapping.end(self._number)


def take(call: SharedCall | None, part: pb.EmbedLayersResponse | pb.EmbedStreamResponse) -> wire.View | None:
    """Returns where to find rows that lie in shared memory, if the message has any and the call requested it."""
    return call.take(part.shared_rows) if call is not None and part.HasField("shared_rows") else None


class _Message:
    """The rows of one message, in use until the last array of them is collected."""

    __slots__ = ("_getpid", "_mapping", "_slot")
    _TAKEN = 1
    _RELEASED = 2

    def __init__(self, mapping: Mapping, slot: int) -> None:
        self._mapping = mapping
        self._slot = slot
        self._getpid = os.getpid  # What the module holds may be gone when the interpreter ends.
        mapping.slots[slot] = self._TAKEN

    def __call__(self, offset: int, byte_count: int) -> wire.ByteArray:
        return self._mapping.rows(self, offset, byte_count)

    def __del__(self) -> None:
        if self._getpid() == self._mapping.pid:
            self._mapping.slots[self._slot] = self._RELEASED


def _map(segment: pb.ShareMemoryResponse) -> wire.ByteArray:
    path = f"/proc/{segment.process_id}/fd/{segment.file_descriptor}"
    # Seen from another host or pid namespace the path is anything: nothing is opened that does not look right.
    if not os.readlink(path).startswith("/memfd:layertap"):
        raise OSError(f"{path} is another file here; do client and server share a host and a pid namespace?")
    import fcntl  # Not on every system, but where there are memfds.

    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        if not stat.S_ISREG(status.st_mode) or status.st_size != segment.byte_count or not sealed:
            raise OSError(f"{path} is not what the server described")
        if status.st_uid != os.geteuid():
            raise OSError(f"{path} belongs to another user")
        mapping = mmap.mmap(descriptor, segment.byte_count)
    finally:
        os.close(descriptor)
    with contextlib.suppress(AttributeError, OSError):
        mapping.madvise(mmap.MADV_DONTDUMP)
    found = np.frombuffer(mapping, np.uint8)
    if len(segment.nonce) < 16 or found[: len(segment.nonce)].tobytes() != segment.nonce:
        raise OSError(f"{path} is another server's memory here")
    ends = (segment.slot_offset + segment.slot_count, segment.call_offset + 8 * segment.call_count)
    if min(segment.slot_offset, segment.slot_count - 1, segment.call_offset, segment.call_count - 1) < 0 or (
        max(ends) > len(found) or segment.call_offset % 8
    ):
        raise OSError("the server describes tables that lie outside the segment")
    return found
