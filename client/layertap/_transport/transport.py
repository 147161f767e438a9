"""The calls of a synchronous client over its channels, the first opened at the first call and anew in a forked child.

Sends what `requests` makes, reads answers with `responses` and `assembler`, and raises failures as layertap's errors;
`async_transport` is its twin. Imported at the first call of a client, because importing gRPC reads the environment.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
from collections.abc import Generator, Iterable
from typing import Any

import grpc

from layertap import wire
from layertap._protocol import requests, responses
from layertap._protocol.assembler import EmbedAssembler, LayerAssembler
from layertap._protocol.collected import CollectedStream
from layertap._protocol.inputs import InputItem
from layertap._protocol.model_info import read_model_info
from layertap._protocol.requests import ResponseT
from layertap._protocol.responses import ModelPin
from layertap._protocol.stream_state import StreamState
from layertap._shared_memory.mapping import SharedCall, SharedMemory, take
from layertap._shared_memory.session import Lease
from layertap._transport import fork
from layertap._transport.answers import Part, Reply
from layertap._transport.channel import open_channel
from layertap._transport.connections import BUSY_CALL_COUNT, INFO_TIMEOUT_S, Opened, Spread, UnaryMethods, least_busy
from layertap._transport.duplex import DuplexChannel, end
from layertap._transport.embed_stream import EmbedStream
from layertap._transport.settings import CallSettings, Connection, StreamSettings
from layertap._transport.status import REQUEST_ID, translate
from layertap._transport.stream_calls import Endpoint
from layertap._transport.sync_bridge import SyncBridge
from layertap._transport.threads import check_threads
from layertap.errors import FailedPreconditionError, LayertapError
from layertap.model_info import ModelInfo
from layertap.results.embedding import Embedding
from layertap.results.streamed import LayerRows, StreamResult
from layertap.v1 import embedding_pb2 as pb

CLOSED = "this client is closed; make a new one"


class Transport:
    """The calls of `Client`. Threads may share it."""

    def __init__(self, connection: Connection, memory: SharedMemory, channel: grpc.Channel | None) -> None:
        self.connection = connection
        self.pin = ModelPin(connection.fingerprint)
        self._memory = memory
        self._lock = threading.RLock()  # Garbage that is collected under it may be a call, which takes it to end.
        self._given = channel
        self._opened: list[Opened[grpc.Channel, Lease]] = []
        self._spread = Spread(1)
        self._spreading = threading.Lock()
        self._model: ModelInfo | None = None
        self._bridges: set[SyncBridge] = set()
        self._pid = 0
        self._closed = False

    def open(self) -> Opened[grpc.Channel, Lease]:
        """Returns the first connection.

        Raises:
            FailedPreconditionError: if the client is closed.
        """
        opened = self._opened
        return self._open() if not opened or self._pid != os.getpid() else opened[0]

    def _take(self, timeout_s: float) -> Opened[grpc.Channel, Lease]:
        """Returns the connection with the fewest calls for one more, which `_leave` ends."""
        connection = self.open()
        if not self._spread.decided and connection.call_count >= BUSY_CALL_COUNT:
            self._open_more(timeout_s, wait=False)
        with self._lock:
            if len(self._opened) > 1:
                connection = least_busy(self._opened)
            connection.call_count += 1
        return connection

    def _leave(self, connection: Opened[grpc.Channel, Lease]) -> None:
        with self._lock:
            connection.call_count -= 1

    def _open(self) -> Opened[grpc.Channel, Lease]:
        with self._lock:
            if self._closed:
                raise FailedPreconditionError(CLOSED)
            fork.check()  # First: where gRPC would hang, it does so already when a parent's channel is released.
            if not self._opened or self._pid != os.getpid():
                self._opened = []  # The channel of a parent is released first.
                self._bridges = set()
                self._spread = Spread(1 if self._given else self.connection.connections)
                self._spreading = threading.Lock()
                opened = self._lend(self._given or open_channel(self.connection))
                self._pid = os.getpid()
                self._opened = [opened]
            return self._opened[0]

    def _lend(self, channel: grpc.Channel) -> Opened[grpc.Channel, Lease]:
        connection = self.connection
        lease = Lease(channel, self._memory, target=connection.target, metadata=connection.metadata)
        return Opened(channel=channel, lease=lease)

    def _open_more(self, timeout_s: float, *, wait: bool) -> None:
        """Opens further connections, once; what stands in the way leaves the client with those that it has.

        Args:
            timeout_s: How long each may take to answer, in seconds.
            wait: Whether to wait for another thread that is about it.
        """
        spread, spreading = self._spread, self._spreading
        if not spreading.acquire(blocking=wait):
            return
        channel: grpc.Channel | None = None
        try:
            if not spread.decided:
                spread.begin(self._info(self.open().unary, timeout_s))
            while not spread.decided:
                channel = open_channel(self.connection, own=True)
                if spread.takes(self._info(UnaryMethods(channel), timeout_s)):
                    with self._lock:
                        if self._closed:
                            break
                        self._opened.append(self._lend(channel))
                else:
                    channel.close()
                channel = None
        except (grpc.RpcError, ValueError, LayertapError):
            spread.decided = True
        finally:
            if channel is not None:
                channel.close()
            spreading.release()

    def _info(self, methods: UnaryMethods, timeout_s: float) -> pb.GetModelInfoResponse:
        wait_s = min(timeout_s, INFO_TIMEOUT_S)
        raw = methods["GetModelInfo"](b"", timeout=wait_s, metadata=self.connection.metadata)
        return responses.read_whole(raw, pb.GetModelInfoResponse)

    def unary(self, request: requests.Unary[ResponseT], call: CallSettings) -> Reply[ResponseT]:
        """Sends one request and waits for its answer."""
        sent = request.request.SerializeToString()
        try:
            connection = self._take(call.timeout_s)
            try:
                method = connection.unary[request.rpc]
                raw, ended = method.with_call(sent, timeout=call.timeout_s, metadata=call.metadata)
            finally:
                self._leave(connection)
        except (grpc.RpcError, ValueError) as exc:
            raise self._error(exc, call) from exc
        trailing = ended.trailing_metadata()
        return Reply(message=responses.read_whole(raw, request.response), request_id=request_id(trailing))

    def model_info(self, call: CallSettings) -> ModelInfo:
        """Asks which model is served."""
        info = read_model_info(self.unary(requests.model_info(), call).message)
        self.pin.check(info.model_id, info.fingerprint)
        return info

    def known_model(self, call: CallSettings) -> ModelInfo:
        """Returns the served model; only the first call asks the server."""
        if self._model is None:
            self._model = self.model_info(call)
        return self._model

    def embed(self, request: requests.Embed, call: CallSettings) -> Embedding:
        """Sends one request by the RPC that suits its answer, and returns the whole answer."""
        if request.may_exceed_limits and request.exceeds(self.known_model(call).limits, call.named_timeout):
            state = CollectedStream(request.messages, request.options, self.pin)
            for _ in self.stream(state, request.messages, call.for_stream()):
                pass
            return state.whole()
        if request.is_small:
            reply = self.unary(request.unary(), call)
            return responses.read_embedding(
                reply.message, request.messages, request.options, self.pin, reply.request_id
            )
        assembler = EmbedAssembler(request.messages, request.options, self.pin)
        with contextlib.closing(self._parts(request, call, assembler)) as parts:
            for part in parts:
                assembler.feed(part.message, part.data, part.view)
        return assembler.finish()

    def embed_layers(self, request: requests.Embed, call: CallSettings) -> Generator[LayerRows, None, None]:
        """Sends one request and yields the rows of its layers as they come."""
        assembler = LayerAssembler(request.messages, request.options, self.pin)
        with contextlib.closing(self._parts(request, call)) as parts:
            for part in parts:
                yield from assembler.feed(part.message, part.data, part.view)
        assembler.finish()

    def _parts(
        self, request: requests.Embed, call: CallSettings, assembler: EmbedAssembler | None = None
    ) -> Generator[Part, None, None]:
        """Sends one EmbedLayers and yields its messages; the assembler gets the name of the call at its end."""
        message = request.layers()
        with contextlib.ExitStack() as stack:
            atexit.register(stack.close)  # A call that its caller leaves is ended while gRPC's threads still run.
            stack.callback(atexit.unregister, stack.close)
            connection = self._take(call.timeout_s)
            stack.callback(self._leave, connection)
            method = connection.channel.unary_stream(requests.SERVICE + "EmbedLayers", None, None)
            shared = connection.lease.begin(call.timeout_s)
            if shared is not None:
                stack.callback(shared.end)
                message.options.shared_memory.CopyFrom(shared.use)
            try:
                answer = method(message.SerializeToString(), timeout=call.timeout_s, metadata=call.metadata)
                stack.callback(end, answer, os.getpid())
                for raw in answer:
                    part, data = wire.split(pb.EmbedLayersResponse, raw)
                    yield Part(message=part, data=data, view=take(shared, part))
                if assembler is not None:
                    assembler.request_id = request_id(answer.trailing_metadata())
            except (grpc.RpcError, ValueError) as exc:
                raise self._error(exc, call) from exc

    def stream(
        self, state: StreamState, items: Iterable[InputItem] | list[pb.Input], settings: StreamSettings
    ) -> Generator[StreamResult, None, None]:
        """Returns the results of one EmbedStream, as they come.

        Raises:
            FailedPreconditionError: if a library has replaced the threads of the system.
        """
        check_threads()
        return self._results(state, items, settings)

    def _results(
        self, state: StreamState, items: Iterable[InputItem] | list[pb.Input], settings: StreamSettings
    ) -> Generator[StreamResult, None, None]:
        first = self.open()

        async def more() -> list[Endpoint]:
            await asyncio.to_thread(self._open_more, settings.item_timeout_s, wait=True)
            return [self._endpoint(one) for one in self._opened if one is not first]

        def start() -> EmbedStream:
            return EmbedStream(
                endpoint=self._endpoint(first),
                more=more,
                connection=self.connection,
                state=state,
                items=items,
                settings=settings,
            )

        bridge = SyncBridge(start)
        self._bridges.add(bridge)
        try:
            while group := bridge.next_group():
                for result in group:
                    if settings.raising and result.error is not None:
                        raise result.error
                    yield result
        finally:
            self._bridges.discard(bridge)
            bridge.close()

    def _endpoint(self, opened: Opened[grpc.Channel, Lease]) -> Endpoint:
        async def begin(timeout_s: float) -> SharedCall | None:
            return await asyncio.to_thread(opened.lease.begin, timeout_s) if self._memory.wanted else None

        return Endpoint(channel=DuplexChannel(opened.channel), begin=begin)

    def close(self) -> None:
        """Ends the calls under way, and the channel if the client has opened it."""
        with self._lock:
            self._closed = True
            opened, self._opened = self._opened, []
        if self._pid != os.getpid():
            return
        for bridge in list(self._bridges):
            bridge.cancel()
        if self._given is None:
            for one in opened:
                one.channel.close()

    def _error(self, exc: Exception, call: CallSettings) -> Exception:
        return translate(exc, self.connection, call.timeout_s, closed=self._closed)


def request_id(metadata: Iterable[Any] | None) -> str | None:
    """Returns the name of a call in the server's log, from the metadata that ended it."""
    return next((value for name, value in metadata or () if name == REQUEST_ID and isinstance(value, str)), None)
