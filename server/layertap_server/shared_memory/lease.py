"""Leases of shared memory in the contract's words: the RPC ShareMemory, and the calls that name a segment.

A lease lasts as long as its RPC. That ends when the client closes, when it dies, and when the server stops; nothing
else has to be told. A call whose segment is gone goes on with bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import os
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence

from layertap.v1 import embedding_pb2 as pb
from layertap_server.shared_memory.segment import Lending, Segment, Segments
from layertap_server.types import Plan, Text


class Sharing:
    """The leases of one server."""

    def __init__(self, segments: Segments) -> None:
        """Takes what makes segments."""
        self._segments = segments
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Ends all leases, so that they do not hold up the end of the server. Running calls go on, with bytes."""
        self._stopping.set()

    async def lease(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Answers one ShareMemory; returns when the server stops, and is cancelled when the caller leaves.

        Raises:
            FailedPreconditionError: The server shares no memory.
            ResourceExhaustedError: There is none left.
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


def placed(plan: Plan, lending: Lending | None, texts: Sequence[Text] = ()) -> Plan:
    """Returns a plan whose rows go into shared memory where there is room.

    Args:
        plan: What is asked.
        lending: What the call may use; None: nothing.
        texts: All texts of the call, if they are known: then each tensor gets one place for all of them, whichever
            batches they are computed in, and the caller need not put them together.
    """
    if lending is None:
        return plan
    return dataclasses.replace(plan, allocate=_Placement(plan, lending, texts))


class _Placement:
    """Where the tensors of one call go. To be called from any instance."""

    def __init__(self, plan: Plan, lending: Lending, texts: Sequence[Text]) -> None:
        self._plan, self._lending = plan, lending
        self._starts = {
            output.unit: list(itertools.accumulate(output.row_counts(texts), initial=0)) for output in plan.outputs
        }
        size = sum(map(plan.byte_counts.of, texts))
        # A larger call would keep room that its own first layers could soon give back.
        self._whole = 0 < size <= lending.segment.byte_count // 2
        self._lock = threading.Lock()

    def __call__(self, first_text: int, output_index: int, layer: int, byte_count: int) -> memoryview | None:
        if self._whole:
            kept, output = self._lending.kept, self._plan.outputs[output_index]
            starts = self._starts[output.unit]
            row_bytes = self._plan.row_bytes(output)
            with self._lock:
                if (output_index, layer) not in kept:
                    kept[output_index, layer] = self._lending.allocate(starts[-1] * row_bytes)
                whole = kept.get((output_index, layer))  # The call may have ended in this moment.
            if whole is not None:
                start = starts[first_text] * row_bytes
                return whole[start : start + byte_count]
        return self._lending.allocate(byte_count)
