"""The RPCs: each request from `admission` through `preprocess` to the batcher, and its rows back through `responses`.

Everything a user can get wrong is refused before the queue. Nothing here blocks the event loop: what may take long
(parsing, tokenizing or packing much) runs in threads. Handlers take and give bytes: so parsing may leave the loop, and
each payload is written once (see `layertap.wire`, which has the figures).
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import time
from collections import deque
from collections.abc import Mapping, Sequence

from layertap.errors import InvalidArgumentError
from layertap.v1 import embedding_pb2 as pb
from layertap_server.model.tokenized import Tokenized
from layertap_server.protocol import responses, rows
from layertap_server.protocol.frames import FrameBuffers, frames_of
from layertap_server.protocol.offload import LARGE_BYTES
from layertap_server.protocol.preprocess import Preprocessor
from layertap_server.protocol.requests import parse
from layertap_server.protocol.tokenizer_requests import TokenizerRequests
from layertap_server.rpc.caller import Caller
from layertap_server.rpc.embed_stream import Stream
from layertap_server.rpc.handlers import Unlimited
from layertap_server.scheduler.batcher import Batcher
from layertap_server.scheduler.call import EventQueue
from layertap_server.scheduler.events import Event, RowsReady
from layertap_server.shared_memory.allocator import allocator
from layertap_server.shared_memory.lease import Sharing
from layertap_server.shared_memory.segment import Lending
from layertap_server.types import Plan


class EmbeddingService:
    """Answers the RPCs of the contract; see `handlers.Service`.

    Args:
        preprocessor: The pipeline of requests.
        batcher: The queue and its instances.
        on_cpu: Whether the CPU computes.
        info: The answer to GetModelInfo, serialized.
        lookahead_tokens: How many tokens of one EmbedStream may wait in the queue.
        sharing: The leases of shared memory.
        stopping: Set once the server stops.
    """

    def __init__(
        self,
        *,
        preprocessor: Preprocessor,
        batcher: Batcher,
        on_cpu: bool,
        info: bytes,
        lookahead_tokens: int,
        sharing: Sharing,
        stopping: asyncio.Event,
    ) -> None:
        self._preprocessor = preprocessor
        self._model, self._tokenizer = preprocessor.model, preprocessor.tokenizer
        self._tokenizer_requests = TokenizerRequests(preprocessor)
        self._batcher = batcher
        self._on_cpu = on_cpu
        self._info = info
        self._lookahead_tokens = lookahead_tokens
        self._sharing = sharing
        self._stopping = stopping
        self._max_response_bytes = preprocessor.limits.max_response_bytes
        self._max_frame_bytes = preprocessor.limits.max_frame_bytes
        self.unlimited: Mapping[str, Unlimited] = {}
        self.unary = {
            "GetModelInfo": self._get_model_info,
            "Tokenize": self._tokenize,
            "Decode": self._decode,
            "Embed": self._embed,
        }
        self.streams = {
            "EmbedLayers": self._embed_layers,
            "EmbedStream": self._embed_stream,
            "ShareMemory": self._share_memory,
        }

    async def _get_model_info(self, raw: bytes, caller: Caller) -> bytes:
        await parse(pb.GetModelInfoRequest, raw)
        return self._info

    async def _tokenize(self, raw: bytes, caller: Caller) -> bytes:
        return await self._tokenizer_requests.tokenize(raw, caller.record, hold=caller.add_bytes)

    async def _decode(self, raw: bytes, caller: Caller) -> bytes:
        return await self._tokenizer_requests.decode(raw, caller.record)

    async def _embed(self, raw: bytes, caller: Caller) -> bytes:
        request, inputs = await self._preprocessor.parse(pb.EmbedRequest, pb.Input, raw)
        plan, tokenized = await self._preprocessor.embed(
            inputs, request.options, caller.record, hold=caller.add_bytes, byte_count=len(raw)
        )
        size = responses.byte_count(plan, tokenized)
        if size > self._max_response_bytes:
            raise InvalidArgumentError(
                f"the answer would have about {size} bytes, the most of Embed is {self._max_response_bytes}; "
                "send fewer texts at once, or use embed_stream (the RPC EmbedStream) or the RPC EmbedLayers"
            )
        parts = await rows.collect(self._batcher, plan, tokenized, caller)
        answer = functools.partial(
            responses.embedded, self._model, plan, tokenized, parts, self._tokenizer, caller.record
        )
        started_at_ns = time.monotonic_ns()
        serialized = await asyncio.to_thread(answer) if size > LARGE_BYTES else answer()
        caller.record.send.note(started_at_ns, time.monotonic_ns())
        return serialized

    async def _embed_layers(self, raw: bytes, caller: Caller) -> None:
        request, inputs = await self._preprocessor.parse(pb.EmbedLayersRequest, pb.Input, raw)
        plan, tokenized = await self._preprocessor.embed(inputs, request.options, caller.record, hold=caller.add_bytes)
        with self._sharing.lend(request.options) as lending:
            header = responses.header(self._model, plan, tokenized)
            frame_count = await self._send_layers(header, plan, tokenized, caller, lending)
        summary = pb.EmbedSummary(frame_count=frame_count, timings=responses.timings(caller.record))
        await caller.write(pb.EmbedLayersResponse(summary=summary).SerializeToString())

    async def _send_layers(
        self,
        header: pb.EmbedHeader,
        plan: Plan,
        tokenized: Sequence[Tokenized],
        caller: Caller,
        lending: Lending | None,
    ) -> int:
        """Sends all of an EmbedLayers answer but its summary; returns how many frames that were."""
        inbox: EventQueue[Event] = EventQueue(self._batcher.waker)
        frame_count = 0
        places = allocator(lending, plan, [one.text for one in tokenized])
        if places is None and self._on_cpu:
            places = FrameBuffers(plan, self._max_frame_bytes)
        with rows.queued(self._batcher, plan, tokenized, inbox, caller, places, keeps_rows=False) as call:
            await caller.write(pb.EmbedLayersResponse(header=header).SerializeToString())
            lists = itertools.chain(
                responses.token_groups(tokenized, self._tokenizer, self._max_frame_bytes) if plan.return_tokens else (),
                responses.word_groups(tokenized, self._max_frame_bytes) if plan.has_words else (),
            )
            if plan.return_tokens or plan.has_words:
                for message in await asyncio.to_thread(lambda: [one.SerializeToString() for one in lists]):
                    await caller.write(message)
            left = len(tokenized)
            while left:
                events = deque(await inbox.take())
                while events:
                    event = events.popleft()
                    if isinstance(event, RowsReady):
                        byte_count = len(event.rows.data)
                        frame_count += await self._send_frames(event, plan, caller, lending)
                        del event  # Bytes are given back once nothing here holds them.
                        call.release(byte_count)
                    else:
                        left -= caller.record.run(rows.done(event))
                        call.release(0, run_done=True)
        return frame_count

    async def _send_frames(self, ready: RowsReady, plan: Plan, caller: Caller, lending: Lending | None) -> int:
        """Sends rows; returns in how many frames."""
        count = 0
        for frame in frames_of(rows.good(ready), plan, self._max_frame_bytes, lending):
            await caller.write(frame)
            count += 1
        return count

    async def _embed_stream(self, raw: bytes, caller: Caller) -> None:
        first = await parse(pb.EmbedStreamRequest, raw)
        if first.WhichOneof("kind") != "options":
            raise InvalidArgumentError("the first message must carry options; send them once, before all inputs")
        with self._sharing.lend(first.options.options) as lending:
            stream = Stream(
                first.options,
                preprocessor=self._preprocessor,
                caller=caller,
                inbox=EventQueue(self._batcher.waker),
                stopping=self._stopping,
                lookahead_tokens=self._lookahead_tokens,
                lending=lending,
            )
            places = allocator(lending, stream.plan)
            with rows.queued(self._batcher, stream.plan, (), stream.inbox, caller, places) as call:
                header = responses.header(self._model, stream.plan)
                await caller.write(pb.EmbedStreamResponse(header=header).SerializeToString())
                await stream.run(call)

    async def _share_memory(self, raw: bytes, caller: Caller) -> None:
        await parse(pb.ShareMemoryRequest, raw)
        await self._sharing.lease(caller.write)
