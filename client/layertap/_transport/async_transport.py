"""The calls of an asyncio client over its channels; the twin of `transport`, which says what each does."""

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
from layertap._protocol.model_info import read_model_info
from layertap._protocol.requests import ResponseT
from layertap._protocol.responses import ModelPin
from layertap._protocol.stream_state import StreamState
from layertap._shared_memory.mapping import SharedMemory, take
from layertap._shared_memory.session import AsyncLease
from layertap._transport import fork
from layertap._transport.answers import Part, Reply
from layertap._transport.channel import open_async_channel
from layertap._transport.connections import BUSY_CALL_COUNT, INFO_TIMEOUT_S, Opened, Spread, UnaryMethods, least_busy
from layertap._transport.embed_stream import EmbedStream, Items
from layertap._transport.settings import CallSettings, Connection, StreamSettings
from layertap._transport.status import CLOSED_DURING_CALL, translate
from layertap._transport.stream_calls import Endpoint
from layertap._transport.transport import CLOSED, request_id
from layertap.errors import CancelledError, FailedPreconditionError, LayertapError
from layertap.model_info import ModelInfo
from layertap.results.embedding import Embedding
from layertap.results.streamed import LayerRows, StreamResult
from layertap.v1 import embedding_pb2 as pb


class AsyncTransport:
    """The calls of `AsyncClient`. The tasks of one event loop may share it; a new loop gets a new channel."""

    def __init__(self, connection: Connection, memory: SharedMemory, channel: grpc.aio.Channel | None) -> None:
        self.connection = connection
        self.pin = ModelPin(connection.fingerprint)
        self._memory = memory
        self._given = channel
        self._opened: list[Opened[grpc.aio.Channel, AsyncLease]] = []
        self._spread = Spread(1)
        self._spreading = asyncio.Lock()
        self._model: ModelInfo | None = None
        self._owner: tuple[int, asyncio.AbstractEventLoop] | None = None
        self._closed = False

    def open(self) -> Opened[grpc.aio.Channel, AsyncLease]:
        """See `Transport.open`."""
        owner = os.getpid(), asyncio.get_running_loop()
        if not self._opened or self._owner != owner:
            if self._closed:
                raise FailedPreconditionError(CLOSED)
            fork.check()
            self._opened = []  # In a child gRPC starts anew only when the channel of the parent is released.
            self._spread = Spread(1 if self._given else self.connection.connections)
            self._spreading = asyncio.Lock()
            opened = self._lend(self._given or open_async_channel(self.connection))
            self._owner = owner
            self._opened = [opened]
        return self._opened[0]

    async def _take(self, timeout_s: float) -> Opened[grpc.aio.Channel, AsyncLease]:
        """See `Transport._take`."""
        connection = self.open()
        if not self._spread.decided and connection.call_count >= BUSY_CALL_COUNT and not self._spreading.locked():
            await self._open_more(timeout_s)
        if len(self._opened) > 1:
            connection = least_busy(self._opened)
        connection.call_count += 1
        return connection

    @staticmethod
    def _leave(connection: Opened[grpc.aio.Channel, AsyncLease]) -> None:
        connection.call_count -= 1

    def _lend(self, channel: grpc.aio.Channel) -> Opened[grpc.aio.Channel, AsyncLease]:
        connection = self.connection
        lease = AsyncLease(channel, self._memory, target=connection.target, metadata=connection.metadata)
        return Opened(channel=channel, lease=lease)

    async def _open_more(self, timeout_s: float) -> None:
        """See `Transport._open_more`."""
        spread, channel = self._spread, None
        async with self._spreading:
            try:
                if not spread.decided:
                    spread.begin(await self._info(self.open().unary, timeout_s))
                while not spread.decided:
                    channel = open_async_channel(self.connection, own=True)
                    if spread.takes(await self._info(UnaryMethods(channel), timeout_s)) and not self._closed:
                        self._opened.append(self._lend(channel))
                    else:
                        await channel.close(grace=None)
                    channel = None
            except (grpc.RpcError, grpc.aio.UsageError, LayertapError):
                spread.decided = True
            finally:
                if channel is not None:
                    await channel.close(grace=None)

    async def _info(self, methods: UnaryMethods, timeout_s: float) -> pb.GetModelInfoResponse:
        wait_s = min(timeout_s, INFO_TIMEOUT_S)
        raw = await methods["GetModelInfo"](b"", timeout=wait_s, metadata=self.connection.metadata)
        return responses.read_whole(raw, pb.GetModelInfoResponse)

    async def unary(self, request: requests.Unary[ResponseT], call: CallSettings) -> Reply[ResponseT]:
        """See `Transport.unary`."""
        sent = request.request.SerializeToString()
        try:
            connection = await self._take(call.timeout_s)
            try:
                answer = connection.unary[request.rpc](sent, timeout=call.timeout_s, metadata=call.metadata)
                raw = await answer
                trailing = await answer.trailing_metadata()
            finally:
                self._leave(connection)
        except (grpc.RpcError, grpc.aio.UsageError) as exc:
            raise self._error(exc, call) from exc
        except asyncio.CancelledError as exc:
            self._raise_if_closed(exc)
            raise
        return Reply(message=responses.read_whole(raw, request.response), request_id=request_id(trailing))

    async def model_info(self, call: CallSettings) -> ModelInfo:
        """See `Transport.model_info`."""
        info = read_model_info((await self.unary(requests.model_info(), call)).message)
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
        message = request.layers()
        with contextlib.ExitStack() as stack:
            try:
                connection = await self._take(call.timeout_s)
                stack.callback(self._leave, connection)
                method = connection.channel.unary_stream(requests.SERVICE + "EmbedLayers", None, None)
                shared = await connection.lease.begin(call.timeout_s)
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
        first = self.open()

        async def more() -> list[Endpoint]:
            await self._open_more(settings.item_timeout_s)
            return [_endpoint(one) for one in self._opened if one is not first]

        running = EmbedStream(
            endpoint=_endpoint(first),
            more=more,
            connection=self.connection,
            state=state,
            items=items,
            settings=settings,
        )
        try:
            while group := await running.next_group():
                for result in group:
                    if settings.raising and result.error is not None:
                        raise result.error
                    yield result
        finally:
            await running.close()

    async def close(self) -> None:
        """See `Transport.close`."""
        self._closed = True
        opened, self._opened = self._opened, []
        if self._given is None and self._owner == (os.getpid(), asyncio.get_running_loop()):
            for one in opened:
                await one.channel.close(grace=None)

    def _error(self, exc: Exception, call: CallSettings) -> Exception:
        return translate(exc, self.connection, call.timeout_s, closed=self._closed)

    def _raise_if_closed(self, exc: asyncio.CancelledError) -> None:
        """Raises layertap's own error if `close` ended the call; the cancellation of a task is left alone."""
        if self._closed:
            raise CancelledError(CLOSED_DURING_CALL) from exc


def _endpoint(opened: Opened[grpc.aio.Channel, AsyncLease]) -> Endpoint:
    return Endpoint(channel=opened.channel, begin=opened.lease.begin)
