"""Leases of shared memory: the RPC ShareMemory, and the calls that name a segment.

A lease lasts as long as its RPC, which ends when the client closes, when it dies, and when the server stops. A call
whose segment is gone goes on with bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Iterator

from layertap.v1 import embedding_pb2 as pb
from layertap_server.shared_memory.segment import Lending, Segment, Segments


class Sharing:
    """The leases of one server."""

    def __init__(self, segments: Segments) -> None:
        self._segments = segments
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Ends all leases, so that they do not hold up the end of the server. Running calls go on, with bytes."""
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
            self._segments.close(segment)

    @contextlib.contextmanager
    def lend(self, options: pb.EmbedOptions) -> Iterator[Lending | None]:
        """Gives what a call may use of the segment that it names, and takes it back at the end of the call.

        None if it names none, or one that is gone.
        """
        asked = options.shared_memory
        lending = self._segments.lend(asked.segment_id, asked.call_number) if asked.segment_id else None
        try:
            yield lending
        finally:
            if lending is not None:
                lending.close()

    async def _open(self) -> Segment:
        opening = asyncio.ensure_future(asyncio.to_thread(self._segments.open))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            # The caller has left while the thread still makes it.
            opening.add_done_callback(self._close_made)
            raise

    def _close_made(self, opening: asyncio.Future[Segment]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self._segments.close(opening.result())
