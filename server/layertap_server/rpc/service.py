"""The RPCs: each request from `admission` through `preprocess` to the batcher, and its rows back through `responses`.

Everything a user can get wrong is refused before the queue. Nothing here blocks the event loop: what may take long
(parsing, tokenizing or packing much) runs in threads. Handlers take and give bytes: so parsing may leave the loop, and
each payload is written once (see `layertap.wire`, which has the figures).
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from typing import Any

import grpc
import grpc.aio

from layertap import wire
from layertap.errors import InvalidArgumentError
from layertap.v1 import embedding_pb2 as pb
from layertap_server.model.facts import ModelFacts
from layertap_server.model.tokenized import Tokenized
from layertap_server.model.tokenizer import Tokenizer
from layertap_server.protocol import responses, rows, tokenizer_requests
from layertap_server.protocol.frames import FrameBuffers, frames_of
from layertap_server.protocol.offload import LARGE_BYTES, offload
from layertap_server.protocol.preprocess import Preprocessor
from layertap_server.protocol.requests import EntryT, MessageT, parse, parse_parts
from layertap_server.rpc.admission import Admission
from layertap_server.rpc.caller import Caller
from layertap_server.rpc.embed_stream import Stream
from layertap_server.scheduler.batcher import Batcher
from layertap_server.scheduler.call import EventQueue, LoopWaker
from layertap_server.scheduler.events import Event, RowsReady
from layertap_server.shared_memory.allocator import allocator
from layertap_server.shared_memory.lease import Sharing
from layertap_server.shared_memory.segment import Lending
from layertap_server.types import Plan


class EmbeddingService:
    """Answers the RPCs of the contract.

    Args:
        preprocessor: The pipeline of requests.
        tokenizer: The model's tokenizer.
        batcher: The queue and its instances.
        model: The model's facts.
        on_cpu: Whether the CPU computes.
        info: The answer to GetModelInfo, serialized.
        lookahead_tokens: How many tokens of one EmbedStream may wait in the queue.
        sharing: The leases of shared memory.
        admission: The admission of calls.
    """

    def __init__(
        self,
        *,
        preprocessor: Preprocessor,
        tokenizer: Tokenizer,
        batcher: Batcher,
        model: ModelFacts,
        on_cpu: bool,
        info: bytes,
        lookahead_tokens: int,
        sharing: Sharing,
        admission: Admission,
    ) -> None:
        self._preprocessor = preprocessor
        self._tokenizer = tokenizer
        self._tokenizer_requests = tokenizer_requests.TokenizerRequests(preprocessor, tokenizer)
        self._batcher = batcher
        self._model = model
        self._on_cpu = on_cpu
        self._info = info
        self._lookahead_tokens = lookahead_tokens
        self._sharing = sharing
        self._admission = admission
        self._max_response_bytes = preprocessor.limits.max_response_bytes
        self._max_frame_bytes = preprocessor.limits.max_frame_bytes

    def handler(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        """Returns what a gRPC server is given."""
        answered = self._admission.answered
        # As streams of requests, whatever the contract says: so a call is admitted before its request is read.
        unary, answer_stream = grpc.stream_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler
        handlers = {
            "GetModelInfo": unary(answered("GetModelInfo", self._get_model_info)),
            "Tokenize": unary(answered("Tokenize", self._tokenize)),
            "Decode": unary(answered("Decode", self._decode)),
            "Embed": unary(answered("Embed", self._embed)),
            "EmbedLayers": answer_stream(answered("EmbedLayers", self._embed_layers)),
            "EmbedStream": answer_stream(answered("EmbedStream", self._embed_stream)),
            "ShareMemory": answer_stream(answered("ShareMemory", self._share_memory)),
        }
        return grpc.method_handlers_generic_handler(wire.SERVICE_NAME, handlers)

    @functools.cached_property
    def _waker(self) -> LoopWaker:
        """Wakes the loop that this service answers in, which runs only once the service is made."""
        return LoopWaker()

    def _parse(
        self, kind: type[MessageT], entry_kind: type[EntryT], raw: bytes
    ) -> Coroutine[Any, Any, tuple[MessageT, Sequence[EntryT]]]:
        return parse_parts(kind, entry_kind, raw, self._preprocessor.limits, self._preprocessor.max_input_bytes)

    async def _get_model_info(self, raw: bytes, caller: Caller) -> bytes:
        await parse(pb.GetModelInfoRequest, raw)
        return self._info

    async def _tokenize(self, raw: bytes, caller: Caller) -> bytes:
        request, inputs = await self._parse(pb.TokenizeRequest, pb.Input, raw)
        texts = await self._tokenizer_requests.tokenize(request, inputs, caller.record, hold=caller.add_bytes)
        size = responses.TOKEN_BYTES * sum(max(one.text.token_count, request.pad_to) for one in texts)
        answer = functools.partial(
            tokenizer_requests.tokenized, self._model, texts, self._tokenizer, pad_to=request.pad_to
        )
        serialized = await offload(answer, in_thread=size > LARGE_BYTES)
        if len(serialized) > self._max_response_bytes:
            raise InvalidArgumentError(
                f"the answer has {len(serialized)} bytes, the most is {self._max_response_bytes}; "
                "send fewer texts at once"
            )
        return serialized

    async def _decode(self, raw: bytes, caller: Caller) -> bytes:
        request, asked = await self._parse(pb.DecodeRequest, pb.TokenIds, raw)
        texts = await self._tokenizer_requests.decode(request, asked, caller.record)
        return tokenizer_requests.decoded(self._model, texts)

    async def _embed(self, raw: bytes, caller: Caller) -> bytes:
        request, inputs = await self._parse(pb.EmbedRequest, pb.Input, raw)
        plan, tokenized = await self._preprocessor.embed(
            inputs, request.options, caller.record, hold=caller.add_bytes, byte_count=len(raw)
        )
        size = responses.byte_count(plan, tokenized)
        if size > self._max_response_bytes:
            raise InvalidArgumentError(
                f"the answer would have about {size} bytes, the most of Embed is {self._max_response_bytes}; "
                "send fewer texts at once, or use embed_stream (the RPC EmbedStream) or the RPC EmbedLayers"
            )
        parts = await rows.collect(self._batcher, self._waker, plan, tokenized, caller)
        answer = functools.partial(
            responses.embedded,
            self._model,
            plan,
            tokenized,
            parts,
            self._tokenizer,
            caller.record,
            named_prompt=self._preprocessor.named_prompt(request.options),
        )
        started_at_ns = time.monotonic_ns()
        serialized = await asyncio.to_thread(answer) if size > LARGE_BYTES else answer()
        caller.record.send.note(started_at_ns, time.monotonic_ns())
        return serialized

    async def _embed_layers(self, raw: bytes, caller: Caller) -> None:
        request, inputs = await self._parse(pb.EmbedLayersRequest, pb.Input, raw)
        plan, tokenized = await self._preprocessor.embed(inputs, request.options, caller.record, hold=caller.add_bytes)
        with self._sharing.lend(request.options) as lending:
            named_prompt = self._preprocessor.named_prompt(request.options)
            header = responses.header(self._model, plan, tokenized, named_prompt=named_prompt)
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
        inbox: EventQueue[Event] = EventQueue(self._waker)
        frame_count = 0
        places = allocator(lending, plan, [one.text for one in tokenized])
        if places is None and self._on_cpu:
            places = FrameBuffers(plan, self._max_frame_bytes)
        with rows.queued(self._batcher, plan, tokenized, inbox, caller, places, keeps_rows=False) as call:
            await caller.write(pb.EmbedLayersResponse(header=header).SerializeToString())
            if plan.return_tokens:
                groups = responses.token_groups(tokenized, self._tokenizer, self._max_frame_bytes)
                for group in await asyncio.to_thread(list, groups):
                    await caller.write(group.SerializeToString())
            if plan.has_words:
                groups = responses.word_groups(tokenized, self._max_frame_bytes)
                for group in await asyncio.to_thread(list, groups):
                    await caller.write(group.SerializeToString())
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
                tokenizer=self._tokenizer,
                caller=caller,
                inbox=EventQueue(self._waker),
                stopping=self._admission.closed,
                lookahead_tokens=self._lookahead_tokens,
                lending=lending,
            )
            places = allocator(lending, stream.plan)
            with rows.queued(self._batcher, stream.plan, (), stream.inbox, caller, places) as call:
                named_prompt = self._preprocessor.named_prompt(first.options.options)
                header = responses.header(self._model, stream.plan, named_prompt=named_prompt)
                await caller.write(pb.EmbedStreamResponse(header=header).SerializeToString())
                await stream.run(call)

    async def _share_memory(self, raw: bytes, caller: Caller) -> None:
        await parse(pb.ShareMemoryRequest, raw)
        await self._sharing.lease(caller.write)
