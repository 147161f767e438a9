"""What the clients send over: one channel, made at the first call, and anew in a forked child.

Both kinds here send what `requests` has made and hand back what came; they differ only in how they wait. Imported at
the first call of a client, because importing gRPC reads the environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator
from typing import Generic

import grpc
import grpc.aio

from layertap import wire
from layertap._protocol import requests
from layertap._protocol.inputs import InputItem
from layertap._protocol.model_pin import ModelPin
from layertap._protocol.requests import ResponseT
from layertap._protocol.stream_state import StreamState
from layertap._shared_memory.mapping import SharedCall, SharedMemory, take
from layertap._shared_memory.session import AsyncLease, Lease
from layertap._transport import fork
from layertap._transport.channel import open_async_channel, open_channel
from layertap._transport.duplex import DuplexChannel
from layertap._transport.embed_stream import EmbedStream, Groups, Items
from layertap._transport.settings import CallSettings, Connection
from layertap._transport.status import CLOSED_DURING_CALL, request_id, translate
from layertap._transport.sync_bridge import SyncBridge
from layertap.errors import CancelledError, FailedPreconditionError
from layertap.results.embedding import StreamResult
from layertap.v1 import embedding_pb2 as pb

_CLOSED = "this client is closed; make a new one"

NoteRequestId = Callable[[str | None], None]
"""Receives the name of a call in the server's log, once the call has ended."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One message of an EmbedLayers answer.

    Attributes:
        message: The message without its payload.
        data: The payload.
        view: Where to find rows that lie in shared memory.
    """

    message: pb.EmbedLayersResponse
    data: memoryview
    view: wire.View | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reply(Generic[ResponseT]):
    """One unary answer, and the name of its call in the server's log."""

    message: ResponseT
    request_id: str | None


class Transport:
    """What `Client` sends over. Threads may share it."""

    def __init__(self, connection: Connection, memory: SharedMemory, channel: grpc.Channel | None) -> None:
        self.connection = connection
        self.pin = ModelPin(connection.fingerprint)
        self._memory = memory
        self._lock = threading.Lock()
        self._given = channel
        self._channel: grpc.Channel | None = None
        self._lease: Lease | None = None
        self._bridges: set[SyncBridge] = set()
        self._pid = 0
        self._closed = False

    def open(self) -> tuple[grpc.Channel, Lease]:
        """Returns the channel and the memory shared over it.

        Raises:
            FailedPreconditionError: if the client is closed.
        """
        with self._lock:
            if self._closed:
                raise FailedPreconditionError(_CLOSED)
            fork.check()  # First: where gRPC would hang, it does so already when a parent's channel is released.
            if self._channel is None or self._lease is None or self._pid != os.getpid():
                self._channel = self._lease = None  # What a parent has left goes first.
                self._bridges = set()
                self._channel = self._given or open_channel(self.connection)
                self._lease = Lease(
                    self._channel, self._memory, target=self.connection.target, metadata=self.connection.metadata
                )
                self._pid = os.getpid()
            return self._channel, self._lease

    def unary(self, request: requests.Unary[ResponseT], call: CallSettings) -> Reply[ResponseT]:
        """Sends one request and waits for its answer."""
        method = self.open()[0].unary_unary(requests.SERVICE + request.rpc, None, None)
        try:
            raw, ended = method.with_call(
                request.request.SerializeToString(), timeout=call.timeout_s, metadata=call.metadata
            )
        except (grpc.RpcError, ValueError) as exc:
            raise translate(exc, self.connection, call.timeout_s, closed=self._closed) from exc
        message = requests.read_whole(raw, request.response)
        return Reply(message=message, request_id=request_id(ended.trailing_metadata()))

    def layers(self, request: pb.EmbedLayersRequest, call: CallSettings, note: NoteRequestId) -> Iterator[Part]:
        """Sends one EmbedLayers and yields its messages."""
        channel, lease = self.open()
        method = channel.unary_stream(requests.SERVICE + "EmbedLayers", None, None)
        with contextlib.ExitStack() as stack:
            shared = lease.begin(call.timeout_s)
            if shared is not None:
                stack.callback(shared.end)
                request.options.shared_memory.CopyFrom(shared.use)
            try:
                answer = method(request.SerializeToString(), timeout=call.timeout_s, metadata=call.metadata)
            except ValueError as exc:
                raise translate(exc, self.connection, call.timeout_s, closed=self._closed) from exc
            stack.callback(answer.cancel)
            try:
                for raw in answer:
                    message, data = wire.split(pb.EmbedLayersResponse, raw)
                    yield Part(message=message, data=data, view=take(shared, message))
                note(request_id(answer.trailing_metadata()))
            except grpc.RpcError as exc:
                raise translate(exc, self.connection, call.timeout_s, closed=self._closed) from exc

    def stream(
        self,
        state: StreamState,
        items: Iterable[InputItem] | list[pb.Input],
        call: CallSettings,
        *,
        item_timeout_s: float,
        reconnect_timeout_s: float,
    ) -> Generator[list[StreamResult], None, None]:
        """Runs one EmbedStream over the channel and yields its results in groups, as they come."""

        async def begin(timeout_s: float) -> SharedCall | None:
            return await asyncio.to_thread(self.open()[1].begin, timeout_s) if self._memory.wanted else None

        channel, _ = self.open()

        def start() -> Groups:
            return EmbedStream(
                channel=DuplexChannel(channel),
                connection=self.connection,
                metadata=call.metadata,
                begin=begin,
                state=state,
                items=items,
                item_timeout_s=item_timeout_s,
                reconnect_timeout_s=reconnect_timeout_s,
            ).results()

        bridge = SyncBridge(start)
        with self._lock:
            self._bridges.add(bridge)
        try:
            yield from bridge
        finally:
            with self._lock:
                self._bridges.discard(bridge)
            bridge.close()

    def close(self) -> None:
        """Ends what is under way, and the channel if it is the client's own."""
        with self._lock:
            self._closed = True
            channel, self._channel, self._lease = self._channel, None, None
            bridges, self._bridges = self._bridges, set()
        if self._pid != os.getpid():
            return
        for bridge in bridges:
            bridge.cancel()
        if channel is not None and channel is not self._given:
            channel.close()


class AsyncTransport:
    """What `AsyncClient` sends over. The tasks of one event loop may share it; a new loop gets a new channel."""

    def __init__(self, connection: Connection, memory: SharedMemory, channel: grpc.aio.Channel | None) -> None:
        self.connection = connection
        self.pin = ModelPin(connection.fingerprint)
        self._memory = memory
        self._given = channel
        self._channel: grpc.aio.Channel | None = None
        self._lease: AsyncLease | None = None
        self._owner: tuple[int, asyncio.AbstractEventLoop] | None = None
        self._closed = False

    def open(self) -> tuple[grpc.aio.Channel, AsyncLease]:
        """See `Transport.open`."""
        if self._closed:
            raise FailedPreconditionError(_CLOSED)
        fork.check()
        owner = os.getpid(), asyncio.get_running_loop()
        if self._channel is None or self._lease is None or self._owner != owner:
            self._channel = self._lease = None  # In a child gRPC starts anew only when what the parent had is gone.
            self._channel = self._given or open_async_channel(self.connection)
            self._lease = AsyncLease(
                self._channel, self._memory, target=self.connection.target, metadata=self.connection.metadata
            )
            self._owner = owner
        return self._channel, self._lease

    async def unary(self, request: requests.Unary[ResponseT], call: CallSettings) -> Reply[ResponseT]:
        """See `Transport.unary`."""
        method = self.open()[0].unary_unary(requests.SERVICE + request.rpc, None, None)
        try:
            answer = method(request.request.SerializeToString(), timeout=call.timeout_s, metadata=call.metadata)
            raw = await answer
            trailing = await answer.trailing_metadata()
        except (grpc.RpcError, grpc.aio.UsageError) as exc:
            raise translate(exc, self.connection, call.timeout_s, closed=self._closed) from exc
        except asyncio.CancelledError as exc:
            self._tell_closing(exc)
            raise
        return Reply(message=requests.read_whole(raw, request.response), request_id=request_id(trailing))

    async def layers(
        self, request: pb.EmbedLayersRequest, call: CallSettings, note: NoteRequestId
    ) -> AsyncGenerator[Part, None]:
        """See `Transport.layers`."""
        channel, lease = self.open()
        method = channel.unary_stream(requests.SERVICE + "EmbedLayers", None, None)
        with contextlib.ExitStack() as stack:
            try:
                shared = await lease.begin(call.timeout_s)
                if shared is not None:
                    stack.callback(shared.end)
                    request.options.shared_memory.CopyFrom(shared.use)
                answer = method(request.SerializeToString(), timeout=call.timeout_s, metadata=call.metadata)
                stack.callback(answer.cancel)
                async for raw in answer:
                    message, data = wire.split(pb.EmbedLayersResponse, raw)
                    yield Part(message=message, data=data, view=take(shared, message))
                note(request_id(await answer.trailing_metadata()))
            except (grpc.RpcError, grpc.aio.UsageError) as exc:
                raise translate(exc, self.connection, call.timeout_s, closed=self._closed) from exc
            except asyncio.CancelledError as exc:
                self._tell_closing(exc)
                raise

    async def stream(
        self,
        state: StreamState,
        items: Items,
        call: CallSettings,
        *,
        item_timeout_s: float,
        reconnect_timeout_s: float,
    ) -> Groups:
        """See `Transport.stream`."""
        channel, lease = self.open()
        running = EmbedStream(
            channel=channel,
            connection=self.connection,
            metadata=call.metadata,
            begin=lease.begin,
            state=state,
            items=items,
            item_timeout_s=item_timeout_s,
            reconnect_timeout_s=reconnect_timeout_s,
        ).results()
        async with contextlib.aclosing(running) as groups:
            async for group in groups:
                yield group

    async def close(self) -> None:
        """See `Transport.close`."""
        self._closed = True
        channel, self._channel, self._lease = self._channel, None, None
        own = channel is not None and channel is not self._given
        if channel is not None and own and self._owner == (os.getpid(), asyncio.get_running_loop()):
            await channel.close(grace=None)

    def _tell_closing(self, exc: asyncio.CancelledError) -> None:
        """Raises layertap's own error if `close` ended the call; a cancelled task stays one."""
        if self._closed:
            raise CancelledError(CLOSED_DURING_CALL) from exc
