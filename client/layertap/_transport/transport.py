"""The wires between a client and its server: one channel, made at the first call, and anew in a forked child.

Both kinds here send what `requests` has made and hand back what came; they differ only in how they wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncGenerator, Iterator

import grpc
import grpc.aio

from layertap import wire
from layertap._protocol import requests
from layertap._protocol.requests import ResponseT
from layertap._shared_memory.mapping import SharedCall, SharedMemory, take
from layertap._shared_memory.session import AsyncLease, Lease
from layertap._transport import fork
from layertap._transport.channel import CLOSED_DURING_CALL, open_async_channel, open_channel, translate
from layertap._transport.settings import Connection
from layertap._transport.sync_bridge import Iteration
from layertap.errors import CancelledError, FailedPreconditionError
from layertap.v1 import embedding_pb2 as pb

_CLOSED = "this client is closed; make a new one"

Part = tuple[pb.EmbedLayersResponse, memoryview, wire.View | None]


class Link:
    """What `Client` sends over. Threads may share it."""

    def __init__(self, connection: Connection, memory: SharedMemory, channel: grpc.Channel | None) -> None:
        """Takes how to connect, or a channel that belongs to the user."""
        self.connection = connection
        self._memory = memory
        self._lock = threading.Lock()
        self._given = channel
        self._channel: grpc.Channel | None = None
        self._lease: Lease | None = None
        self._iterations: set[Iteration] = set()
        self._pid = 0
        self._closed = False

    def timeout_s(self, timeout_s: float | None) -> float:
        """Returns a deadline, in seconds; None: the client's."""
        return self.connection.timeout_s if timeout_s is None else timeout_s

    def open(self) -> tuple[grpc.Channel, Lease]:
        """Returns the channel and the memory shared over it.

        Raises:
            FailedPreconditionError: The client is closed.
        """
        with self._lock:
            if self._closed:
                raise FailedPreconditionError(_CLOSED)
            fork.check()  # First: where gRPC would hang, it does so already when a parent's channel is let go.
            if self._channel is None or self._lease is None or self._pid != os.getpid():
                self._channel = self._lease = None  # What a parent has left goes first.
                self._iterations = set()
                self._channel = self._given or open_channel(self.connection)
                self._lease = Lease(
                    self._channel, self._memory, target=self.connection.target, metadata=self.connection.metadata
                )
                self._pid = os.getpid()
            return self._channel, self._lease

    def unary(self, call: requests.Unary[ResponseT], timeout_s: float | None) -> ResponseT:
        """Sends one request and waits for its answer."""
        timeout_s = self.timeout_s(timeout_s)
        method = self.open()[0].unary_unary(requests.SERVICE + call.rpc, None, None)
        try:
            raw = method(call.request.SerializeToString(), timeout=timeout_s, metadata=self.connection.metadata)
        except (grpc.RpcError, ValueError) as exc:
            raise translate(exc, self.connection, timeout_s, closed=self._closed) from exc
        return requests.read_whole(raw, call.response)

    def layers(self, request: pb.EmbedLayersRequest, timeout_s: float | None) -> Iterator[Part]:
        """Sends one EmbedLayers and yields its messages."""
        timeout_s = self.timeout_s(timeout_s)
        channel, lease = self.open()
        method = channel.unary_stream(requests.SERVICE + "EmbedLayers", None, None)
        with contextlib.ExitStack() as stack:
            shared = lease.begin(timeout_s)
            if shared is not None:
                stack.callback(shared.end)
                request.options.shared_memory.CopyFrom(shared.use)
            try:
                call = method(request.SerializeToString(), timeout=timeout_s, metadata=self.connection.metadata)
            except ValueError as exc:
                raise translate(exc, self.connection, timeout_s, closed=self._closed) from exc
            stack.callback(call.cancel)
            try:
                for raw in call:
                    part, data = wire.split(pb.EmbedLayersResponse, raw)
                    yield part, data, take(shared, part)
            except grpc.RpcError as exc:
                raise translate(exc, self.connection, timeout_s, closed=self._closed) from exc

    async def begin(self, timeout_s: float) -> SharedCall | None:
        """Returns what a stream may use of the shared memory."""
        if not self._memory.wanted:
            return None
        return await asyncio.to_thread(self.open()[1].begin, timeout_s)

    @contextlib.contextmanager
    def iterating(self, iteration: Iteration) -> Iterator[Iteration]:
        """Ends an iteration when it is left, and when the client is closed.

        Raises:
            FailedPreconditionError: The client is closed, or has only a channel that was given to it.
        """
        if self._given is not None:
            raise FailedPreconditionError(
                "embed_stream needs a connection of its own, which a client made from a channel cannot make; use "
                "Client(target), or AsyncClient.from_channel"
            )
        self.open()
        with self._lock:
            self._iterations.add(iteration)
        try:
            yield iteration
        finally:
            with self._lock:
                self._iterations.discard(iteration)
            iteration.close()

    def close(self) -> None:
        """Ends what is under way, and the channel if it is the client's own."""
        with self._lock:
            self._closed = True
            channel, self._channel, self._lease = self._channel, None, None
            iterations, self._iterations = self._iterations, set()
        if self._pid != os.getpid():
            return
        for iteration in iterations:
            iteration.cancel()
        if channel is not None and channel is not self._given:
            channel.close()


class AsyncLink:
    """What `AsyncClient` sends over. The tasks of one event loop may share it; a new loop gets a new channel."""

    def __init__(self, connection: Connection, memory: SharedMemory, channel: grpc.aio.Channel | None) -> None:
        """See `Link`."""
        self.connection = connection
        self._memory = memory
        self._given = channel
        self._channel: grpc.aio.Channel | None = None
        self._lease: AsyncLease | None = None
        self._owner: tuple[int, asyncio.AbstractEventLoop] | None = None
        self._closed = False

    def timeout_s(self, timeout_s: float | None) -> float:
        """See `Link.timeout_s`."""
        return self.connection.timeout_s if timeout_s is None else timeout_s

    def open(self) -> tuple[grpc.aio.Channel, AsyncLease]:
        """See `Link.open`."""
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

    async def unary(self, call: requests.Unary[ResponseT], timeout_s: float | None) -> ResponseT:
        """See `Link.unary`."""
        timeout_s = self.timeout_s(timeout_s)
        method = self.open()[0].unary_unary(requests.SERVICE + call.rpc, None, None)
        try:
            raw = await method(call.request.SerializeToString(), timeout=timeout_s, metadata=self.connection.metadata)
        except (grpc.RpcError, grpc.aio.UsageError) as exc:
            raise translate(exc, self.connection, timeout_s, closed=self._closed) from exc
        except asyncio.CancelledError as exc:
            self._tell_closing(exc)
            raise
        return requests.read_whole(raw, call.response)

    async def layers(self, request: pb.EmbedLayersRequest, timeout_s: float | None) -> AsyncGenerator[Part, None]:
        """See `Link.layers`."""
        timeout_s = self.timeout_s(timeout_s)
        channel, lease = self.open()
        method = channel.unary_stream(requests.SERVICE + "EmbedLayers", None, None)
        with contextlib.ExitStack() as stack:
            try:
                shared = await lease.begin(timeout_s)
                if shared is not None:
                    stack.callback(shared.end)
                    request.options.shared_memory.CopyFrom(shared.use)
                call = method(request.SerializeToString(), timeout=timeout_s, metadata=self.connection.metadata)
                stack.callback(call.cancel)
                async for raw in call:
                    part, data = wire.split(pb.EmbedLayersResponse, raw)
                    yield part, data, take(shared, part)
            except (grpc.RpcError, grpc.aio.UsageError) as exc:
                raise translate(exc, self.connection, timeout_s, closed=self._closed) from exc
            except asyncio.CancelledError as exc:
                self._tell_closing(exc)
                raise

    async def close(self) -> None:
        """See `Link.close`."""
        self._closed = True
        channel, self._channel, self._lease = self._channel, None, None
        own = channel is not None and channel is not self._given
        if channel is not None and own and self._owner == (os.getpid(), asyncio.get_running_loop()):
            await channel.close(grace=None)

    def _tell_closing(self, exc: asyncio.CancelledError) -> None:
        """Raises layertap's own error if `close` ended the call; a cancelled task stays one."""
        if self._closed:
            raise CancelledError(CLOSED_DURING_CALL) from exc
