"""Leases of shared memory: the RPC ShareMemory, and the calls that name a segment.

A lease lasts as long as its RPC, which ends when the client closes, when it dies, and when the server stops. A call
whose segment is gone gets its rows as bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Awaitable, Callable, Iterator

from layertap.errors import FailedPreconditionError, ResourceExhaustedError, counted
from layertap.v1 import embedding_pb2 as pb
from layertap_server.shared_memory.segment import Lending, Pin, Segment


class Sharing:
    """The leases of one server. `open` and `close` may be called from any thread."""

    def __init__(self, *, byte_count: int, max_count: int, pin: Pin | None = None) -> None:
        """Makes no segment until a client asks for one.

        Args:
            byte_count: The size of each segment; 0 means that no memory is shared.
            max_count: How many there may be at once.
            pin: Makes a segment fit for direct copies from a device. None: it is not registered.
        """
        self._byte_count = byte_count
        self._max_count = max_count
        self._pin = pin
        self._places = threading.Semaphore(max_count)
        self._stopping = asyncio.Event()
        self._segments: dict[str, Segment] = {}

    def open(self) -> Segment:
        """Returns a new segment, to be given to `close`. Blocks while the segment is registered with a device.

        Raises:
            FailedPreconditionError: if the server shares no memory.
            ResourceExhaustedError: if there are too many, or the system has no such memory.
        """
        if not self._byte_count:
            raise FailedPreconditionError("this server shares no memory; start it with --shared-memory-bytes")
        if not self._places.acquire(blocking=False):
            raise ResourceExhaustedError(
                f"the server already shares memory with {counted(self._max_count, 'caller')}; close some, or raise "
                "--max-shared-memory-call-count"
            )
        try:
            segment = Segment(self._byte_count, pin=self._pin)
        except BaseException as exc:
            self._places.release()
            if isinstance(exc, OSError):
                raise ResourceExhaustedError(f"the system has no memory to share: {exc.strerror}") from exc
            raise
        self._segments[segment.id] = segment
        return segment

    def close(self, segment: Segment) -> None:
        """Ends a lease."""
        del self._segments[segment.id]
        self._places.release()
        segment.close()

    def stop(self) -> None:
        """Ends all leases, so that they do not delay the end of the server. Running calls get their rows as bytes."""
        self._stopping.set()

    async def lease(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Answers one ShareMemory; returns when the server stops, and is cancelled when the caller leaves.

        Raises:
            FailedPreconditionError: if the server shares no memory.
            ResourceExhaustedError: if there is none left.
        """
        segment = await self._open()
        try:
            answer = pb.ShareMemoryResponse(
                segment_id=segment.id,
                process_id=os.getpid(),
                file_descriptor=segment.descriptor,
                byte_count=segment.byte_count,
                nonce=segment.nonce,
                slot_offset=segment.slot_offset,
                slot_count=segment.slot_count,
                call_offset=segment.call_offset,
                call_count=segment.call_count,
            )
            await write(answer.SerializeToString())
            await self._stopping.wait()
        finally:
            self.close(segment)

    @contextlib.contextmanager
    def lend(self, options: pb.EmbedOptions) -> Iterator[Lending | None]:
        """Lends the segment that a call names until the block ends; None: the call names none, or one that is gone."""
        asked = options.shared_memory
        segment = self._segments.get(asked.segment_id) if asked.call_number > 0 else None
        if segment is None:
            yield None
            return
        lending = segment.lend(asked.call_number)
        try:
            yield lending
        finally:
            lending.close()

    async def _open(self) -> Segment:
        opening = asyncio.ensure_future(asyncio.to_thread(self.open))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            # The caller has left before the thread has made the segment.
            opening.add_done_callback(self._close_made)
            raise

    def _close_made(self, opening: asyncio.Future[Segment]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self.close(opening.result())
