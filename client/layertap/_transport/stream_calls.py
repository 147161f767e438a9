"""The calls of an `embed_stream` over one connection: one, and another after each that breaks, until all are done."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc
import grpc.aio

from layertap import wire
from layertap._protocol.requests import SERVICE
from layertap._protocol.stream_connection import StreamConnection
from layertap._protocol.stream_state import StreamState
from layertap._shared_memory.mapping import SharedCall, take
from layertap._transport.duplex import DuplexChannel
from layertap._transport.settings import Connection, StreamSettings
from layertap._transport.status import CLOSED_DURING_CALL, translate
from layertap.errors import (
    CancelledError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    LayertapError,
    UnavailableError,
    counted,
)
from layertap.v1 import embedding_pb2 as pb

Begin = Callable[[float], Awaitable[SharedCall | None]]
"""Asks, for so many seconds at most, what shared memory a connection may use."""

_BACKOFF_S: Final = 0.05
_MAX_BACKOFF_S: Final = 2.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Endpoint:
    """One connection to the server.

    Attributes:
        channel: Its channel.
        begin: Asks what shared memory a call over it may use.
    """

    channel: grpc.aio.Channel | DuplexChannel
    begin: Begin


class StreamProgress:
    """What the connections of one stream know of each other.

    Attributes:
        state: The items.
        source_ended: Whether no more items come.
        answered_at: When an answer came last, on the clock of `time.monotonic`.
    """

    def __init__(self, state: StreamState) -> None:
        self.state = state
        self.source_ended = False
        self.answered_at = 0.0
        self._waiting: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []

    @property
    def finished(self) -> bool:
        """Whether all is answered."""
        return self.source_ended and not self.state.unanswered_count

    def note_change(self) -> None:
        """Wakes those whose condition holds now: to wake all at each change would cost more than a text does."""
        for condition, future in self._waiting:
            if not future.done() and condition():
                future.set_result(None)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until a condition holds."""
        while not condition():
            waiting = condition, asyncio.get_running_loop().create_future()
            self._waiting.append(waiting)
            try:
                await waiting[1]
            finally:
                self._waiting.remove(waiting)


class StreamCalls:
    """The calls over one connection."""

    def __init__(
        self, endpoint: Endpoint, *, server: Connection, settings: StreamSettings, progress: StreamProgress
    ) -> None:
        self._endpoint = endpoint
        self._server = server
        self._settings = settings
        self._progress = progress
        self._state = progress.state
        self._sent = StreamConnection(progress.state)
        self._moved_at = 0.0

    async def run(self) -> None:
        """Sends and receives until all is answered.

        Raises:
            DeadlineExceededError: if no item was answered for item_timeout_s.
            UnavailableError: if no server answered, at first or for reconnect_timeout_s.
            LayertapError: if the server refuses the call.
        """
        lost_at: float | None = None
        attempt = 0
        while not self._progress.finished:
            try:
                await self._call_once()
            except UnavailableError as exc:
                now = time.monotonic()
                # What other connections bring shows that the server is there.
                if lost_at is None or self._progress.answered_at > lost_at:
                    lost_at, attempt = now, 0
                if now - lost_at >= self._settings.reconnect_timeout_s or not self._state.started:
                    raise
                self._sent.lost(exc)
                self._progress.note_change()
                pause = min(_MAX_BACKOFF_S, _BACKOFF_S * 2**attempt) * random.uniform(0.5, 1.0)
                attempt += 1
                with contextlib.suppress(TimeoutError):
                    left_s = lost_at + self._settings.reconnect_timeout_s - now
                    finished = self._progress.until(lambda: self._progress.finished)
                    await asyncio.wait_for(finished, min(pause, left_s))

    async def run_beside(self) -> None:
        """Does the same for a connection that the stream can do without: if it is refused, its items go to others.

        Raises:
            DataLossError: if an answer does not fit what was sent.
            FailedPreconditionError: if another model answers.
        """
        try:
            await self.run()
        except (DataLossError, FailedPreconditionError):
            raise
        except LayertapError as exc:
            self._state.expected_count = self._state.connection_count  # No more than there are.
            self._sent.lost(exc)
            self._progress.note_change()

    async def _call_once(self) -> None:
        shared = await self._endpoint.begin(self._settings.item_timeout_s)
        try:
            await self._call(shared)
        finally:
            if shared is not None:
                shared.end()

    async def _call(self, shared: SharedCall | None) -> None:
        try:
            method = self._endpoint.channel.stream_stream(SERVICE + "EmbedStream", None, None)
            call = method(None, metadata=self._settings.metadata)
        except grpc.aio.UsageError as exc:
            raise CancelledError(CLOSED_DURING_CALL) from exc
        writer = asyncio.create_task(self._write(call, shared))
        progress, read = self._progress, None
        self._moved_at = time.monotonic()
        try:
            while not progress.finished:
                if self._state.has_ready:  # The caller reads; flow control stops the server meanwhile.
                    await progress.until(lambda: not self._state.has_ready or progress.finished)
                    self._moved_at = time.monotonic()  # The time that the caller took is not the server's.
                    continue
                if read is None:
                    read = asyncio.create_task(call.read())
                    read.add_done_callback(lambda _: progress.note_change())
                await self._wait(read)
                if read.cancelled():
                    raise CancelledError(CLOSED_DURING_CALL)
                if read.done():
                    raw, read = read.result(), None
                    if raw is grpc.aio.EOF:  # type: ignore[attr-defined]  # grpc-stubs lacks it
                        if progress.finished:
                            return
                        raise UnavailableError("the server ended the stream before all items were answered")
                    part, data = wire.split(pb.EmbedStreamResponse, raw)
                    self._sent.feed(part, data, take(shared, part))
                    self._moved_at = progress.answered_at = time.monotonic()
                    progress.note_change()
            # Nothing is owed any more: a server that is slow to end the call takes nothing from the answers.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(writer, self._settings.item_timeout_s)
                await asyncio.wait_for(read or call.read(), self._settings.item_timeout_s)
        except grpc.RpcError as exc:
            error = translate(exc, self._server, None, resumable=True)
            if not self._sent.accepted and int(error.code) != exc.code().value[0]:
                error = await self._refusal(error)
            raise error from exc
        finally:
            writer.cancel()
            call.cancel()
            await asyncio.gather(writer, *([read] if read else []), return_exceptions=True)

    async def _refusal(self, error: LayertapError) -> LayertapError:
        """Returns why a call was not accepted.

        gRPC loses the status of a call that ends while it is still sending, and tells of a fault of its own. Of a call
        that sends next to nothing it does not, so such a one is requested the reason.
        """
        try:
            await self._model_info()
        except grpc.RpcError as exc:
            return translate(exc, self._server, self._settings.item_timeout_s)
        return error

    async def _learn_limit(self) -> None:
        info = pb.GetModelInfoResponse()
        with contextlib.suppress(grpc.RpcError):  # What is wrong with the connection the stream meets too.
            info.MergeFromString(await self._model_info())
        self._state.limit(info.limits.max_request_bytes)
        self._progress.note_change()

    async def _model_info(self) -> bytes:
        method = self._endpoint.channel.unary_unary(SERVICE + "GetModelInfo", None, None)
        try:
            raw: bytes = await method(b"", metadata=self._settings.metadata, timeout=self._settings.item_timeout_s)
        except grpc.aio.UsageError as exc:
            raise CancelledError(CLOSED_DURING_CALL) from exc
        return raw

    @property
    def _waiting_count(self) -> int:
        """Items that this connection owes an answer; while it is the only one, all."""
        alone = self._state.connection_count <= 1
        return self._state.unanswered_count if alone else self._sent.unanswered_count

    async def _wait(self, read: asyncio.Task[Any]) -> None:
        """Waits until a message has come, or there is something else to do: an item begins to wait, or none is left."""
        idle = not self._waiting_count
        if idle:
            self._moved_at = time.monotonic()

        def ended() -> bool:
            starts_or_stops = idle == (self._waiting_count > 0)
            return starts_or_stops or read.done() or self._progress.finished or self._state.has_ready

        left_s = self._moved_at + self._settings.item_timeout_s - time.monotonic()
        try:
            async with asyncio.timeout(None if idle else max(left_s, 0.0)):
                await self._progress.until(ended)
        except TimeoutError:
            if not ended():
                raise DeadlineExceededError(
                    f"no answer came for {self._settings.item_timeout_s} s with "
                    f"{counted(self._waiting_count, 'item')} unanswered; raise item_timeout_s if the server "
                    "needs longer"
                ) from None

    async def _write(self, call: Any, shared: SharedCall | None) -> None:
        # The reading side gets the status of a broken call and tells it.
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            opening = self._state.opening
            if shared is not None:
                opening.options.options.shared_memory.CopyFrom(shared.use)
            await call.write(opening.SerializeToString())
            # A write that meets a refusal would hide its reason: see first whether the options are accepted.
            await self._progress.until(lambda: self._sent.accepted or self._progress.finished)
            while not self._progress.finished:
                while self._sent.has_unsent:
                    if self._state.needs_limit:
                        await self._learn_limit()
                        continue
                    await call.write(self._sent.take().SerializeToString())
                await self._progress.until(lambda: self._sent.has_unsent or self._progress.finished)
            await call.done_writing()
