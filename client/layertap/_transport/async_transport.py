"""The calls of an asyncio client over its one channel; the twin of `transport`, which says what each does."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator

import grpc
import grpc.aio

from layertap import wire
from layertap._protocol import requests, responses
from layertap._protocol.assembler import EmbedAssembler, LayerAssembler
from layertap._protocol.collected import CollectedStream
from layertap._protocol.requests import ResponseT
from layertap._protocol.responses import ModelPin
from layertap._protocol.stream_state import StreamState
from layertap._shared_memory.mapping import SharedMemory, take
from layertap._shared_memory.session import AsyncLease
from layertap._transport import fork
from layertap._transport.channel import open_async_channel
from layertap._transport.embed_stream import EmbedStream, Items
from layertap._transport.settings import CallSettings, Connection, StreamSettings
from layertap._transport.status import CLOSED_DURING_CALL, translate
from layertap._transport.transport import CLOSED, Part, Reply, request_id
from layertap.errors import CancelledError, FailedPreconditionError
from layertap.results.embedding import Embedding
from layertap.results.streamed import LayerRows, StreamResult
from layertap.types import ModelInfo
from layertap.v1 import embedding_pb2 as pb


class AsyncTransport:
    """The calls of `AsyncClient`. The tasks of one event loop may share it; a new loop gets a new channel."""

    def __init__(self, connection: Connection, memory: SharedMemory, channel: grpc.aio.Channel | None) -> None:
        self.connection = connection
        self.pin = ModelPin(connection.fingerprint)
        self._memory = memory
        self._given = channel
        self._opened: tuple[grpc.aio.Channel, AsyncLease] | None = None
        self._model: ModelInfo | None = None
        self._owner: tuple[int, asyncio.AbstractEventLoop] | None = None
        self._closed = False

    def open(self) -> tuple[grpc.aio.Channel, AsyncLease]:
        """See `Transport.open`."""
        owner = os.getpid(), asyncio.get_running_loop()
        if self._opened is None or self._owner != owner:
            if self._closed:
                raise FailedPreconditionError(CLOSED)
            fork.check()
            self._opened = None  # In a child gRPC starts anew only when the channel of the parent is released.
            channel = self._given or open_async_channel(self.connection)
            lease = AsyncLease(channel, self._memory, target=self.connection.target, metadata=self.connection.metadata)
            self._owner = owner
            self._opened = channel, lease
        return self._opened

    async def unary(self, request: requests.Unary[ResponseT], call: CallSettings) -> Reply[ResponseT]:
        """See `Transport.unary`."""
        method = self.open()[0].unary_unary(requests.SERVICE + request.rpc, None, None)
        try:
            answer = method(request.request.SerializeToString(), timeout=call.timeout_s, metadata=call.metadata)
            raw = await answer
            trailing = await answer.trailing_metadata()
        except (grpc.RpcError, grpc.aio.UsageError) as exc:
            raise self._error(exc, call) from exc
        except asyncio.CancelledError as exc:
            self._raise_if_closed(exc)
            raise
        return Reply(message=responses.read_whole(raw, request.response), request_id=request_id(trailing))

    async def model_info(self, call: CallSettings) -> ModelInfo:
        """See `Transport.model_info`."""
        info = responses.read_model_info((await self.unary(requests.model_info(), call)).message)
        self.pin.check(info.model_id, info.fingerprint)
        return info

    async def known_model(self, call: CallSettings) -> ModelInfo:
        """See `Transport.known_model`."""
        if self._model is None:
            self._model = await self.model_info(call)
        return self._model

    async def embed(self, request: requests.Embed, call: CallSettings) -> Embedding:
        """See `Transport.embed`."""
        if request.may_exceed_limits and request.exceeds((await self.known_model(call)).limits, call.named_timeout):
            state = CollectedStream(request.messages, request.options, self.pin)
            async with contextlib.aclosing(self.stream(state, request.messages, call.for_stream())) as results:
                async for _ in results:
                    pass
            return state.whole()
        if request.is_small:
            reply = await self.unary(request.unary(), call)
            return responses.read_embedding(
                reply.message, request.messages, request.options, self.pin, reply.request_id
            )
        assembler = EmbedAssembler(request.messages, request.options, self.pin)
        async with contextlib.aclosing(self._parts(request, call, assembler)) as parts:
            async for part in parts:
                assembler.feed(part.message, part.data, part.view)
        return assembler.finish()

    async def embed_layers(self, request: requests.Embed, call: CallSettings) -> AsyncGenerator[LayerRows, None]:
        """See `Transport.embed_layers`."""
        assembler = LayerAssembler(request.messages, request.options, self.pin)
        async with contextlib.aclosing(self._parts(request, call)) as parts:
            async for part in parts:
                for rows in assembler.feed(part.message, part.data, part.view):
                    yield rows
        assembler.finish()

    async def _parts(
        self, request: requests.Embed, call: CallSettings, assembler: EmbedAssembler | None = None
    ) -> AsyncGenerator[Part, None]:
        """See `Transport._parts`."""
        channel, lease = self.open()
        method = channel.unary_stream(requests.SERVICE + "EmbedLayers", None, None)
        message = request.layers()
        with contextlib.ExitStack() as stack:
            try:
                shared = await lease.begin(call.timeout_s)
                if shared is not None:
                    stack.callback(shared.end)
                    message.options.shared_memory.CopyFrom(shared.use)
                answer = method(message.SerializeToString(), timeout=call.timeout_s, metadata=call.metadata)
                stack.callback(answer.cancel)
                async for raw in answer:
                    part, data = wire.split(pb.EmbedLayersResponse, raw)
                    yield Part(message=part, data=data, view=take(shared, part))
                if assembler is not None:
                    assembler.request_id = request_id(await answer.trailing_metadata())
            except (grpc.RpcError, grpc.aio.UsageError) as exc:
                raise self._error(exc, call) from exc
            except asyncio.CancelledError as exc:
                self._raise_if_closed(exc)
                raise

    async def stream(
        self, state: StreamState, items: Items, settings: StreamSettings
    ) -> AsyncGenerator[StreamResult, None]:
        """See `Transport.stream`."""
        channel, lease = self.open()
        running = EmbedStream(
            channel=channel, connection=self.connection, begin=lease.begin, state=state, items=items, settings=settings
        ).results()
        async with contextlib.aclosing(running) as groups:
            async for group in groups:
                for result in group:
                    if settings.raising and result.error is not None:
                        raise result.error
                    yield result

    async def close(self) -> None:
        """See `Transport.close`."""
        self._closed = True
        opened, self._opened = self._opened, None
        if opened is not None and self._given is None and self._owner == (os.getpid(), asyncio.get_running_loop()):
            await opened[0].close(grace=None)

    def _error(self, exc: Exception, call: CallSettings) -> Exception:
        return translate(exc, self.connection, call.timeout_s, closed=self._closed)

    def _raise_if_closed(self, exc: asyncio.CancelledError) -> None:
        """Raises layertap's own error if `close` ended the call; the cancellation of a task is left alone."""
        if self._closed:
            raise CancelledError(CLOSED_DURING_CALL) from exc
