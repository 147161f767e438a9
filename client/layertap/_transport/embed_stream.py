"""`embed_stream` on the wire: sending and receiving at once, and again after a lost connection.

One asyncio implementation serves both clients; `sync_bridge` lends it to synchronous callers. What to send and what
came back is the business of `StreamState`, not this file's.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable
from typing import Any, Final

import grpc
import grpc.aio

from layertap import wire
from layertap._protocol.inputs import InputItem
from layertap._protocol.requests import SERVICE
from layertap._protocol.stream_state import StreamState
from layertap._shared_memory.mapping import SharedCall, take
from layertap._transport import input_reader
from layertap._transport.duplex import DuplexChannel
from layertap._transport.settings import Connection, StreamSettings
from layertap._transport.status import CLOSED_DURING_CALL, translate
from layertap.errors import CancelledError, DeadlineExceededError, LayertapError, UnavailableError
from layertap.results.streamed import StreamResult
from layertap.v1 import embedding_pb2 as pb

Items = Iterable[InputItem] | AsyncIterable[InputItem] | list[pb.Input]
Groups = AsyncGenerator[list[StreamResult], None]
Begin = Callable[[float], Awaitable[SharedCall | None]]
"""Asks, for so many seconds at most, what shared memory a connection may use."""

_BACKOFF_S: Final = 0.05
_MAX_BACKOFF_S: Final = 2.0


class EmbedStream:
    """One `embed_stream`: reads the items, sends, receives, reconnects."""

    def __init__(
        self,
        *,
        channel: grpc.aio.Channel | DuplexChannel,
        connection: Connection,
        begin: Begin,
        state: StreamState,
        items: Items,
        settings: StreamSettings,
    ) -> None:
        self._channel = channel
        self._server = connection
        self._settings = settings
        self._begin = begin
        self._state = state
        self._items = items
        self._source_ended = False
        self._source_error: BaseException | None = None
        self._change_count = 0
        self._changed = asyncio.Event()
        self._moved_at = 0.0

    async def results(self) -> Groups:
        """Yields answers in groups, as they come.

        Raises:
            DeadlineExceededError: if no item was answered or read for item_timeout_s.
            UnavailableError: if no server answered, at first or for reconnect_timeout_s.
            Exception: if the items raise it; it comes after the answers to all items before it.
        """
        reader = asyncio.create_task(self._read_items())
        lost_at: float | None = None
        attempt = 0
        try:
            while not self._finished:
                try:
                    async with contextlib.aclosing(self._connection()) as groups:
                        async for group in groups:
                            lost_at, attempt = None, 0
                            if group:
                                yield group
                except UnavailableError as exc:
                    now = time.monotonic()
                    lost_at = now if lost_at is None else lost_at
                    if now - lost_at >= self._settings.reconnect_timeout_s or not self._state.started:
                        raise
                    self._state.lost(exc)
                    pause = min(_MAX_BACKOFF_S, _BACKOFF_S * 2**attempt) * random.uniform(0.5, 1.0)
                    attempt += 1
                    await asyncio.sleep(min(pause, lost_at + self._settings.reconnect_timeout_s - now))
            if group := self._state.ready():
                yield group
            if self._source_error is not None:
                raise self._source_error
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    @property
    def _finished(self) -> bool:
        return self._source_ended and not self._state.unanswered_count

    async def _connection(self) -> Groups:
        """Sends and receives over one call until all is answered or the call breaks."""
        shared = await self._begin(self._settings.item_timeout_s)
        try:
            async with contextlib.aclosing(self._call(shared)) as groups:
                async for group in groups:
                    yield group
        finally:
            if shared is not None:
                shared.end()

    async def _call(self, shared: SharedCall | None) -> Groups:
        try:
            method = self._channel.stream_stream(SERVICE + "EmbedStream", None, None)
            call = method(None, metadata=self._settings.metadata)
        except grpc.aio.UsageError as exc:
            raise CancelledError(CLOSED_DURING_CALL) from exc
        writer = asyncio.create_task(self._write(call, shared))
        read: asyncio.Task[Any] | None = None
        self._moved_at = time.monotonic()
        try:
            while not self._finished:
                read = read or asyncio.create_task(call.read())
                await self._wait(read)
                if read.cancelled():
                    raise CancelledError(CLOSED_DURING_CALL)
                if read.done():
                    raw, read = read.result(), None
                    if raw is grpc.aio.EOF:  # type: ignore[attr-defined]  # grpc-stubs lacks it
                        if self._finished:
                            return
                        raise UnavailableError("the server ended the stream before all items were answered")
                    part, data = wire.split(pb.EmbedStreamResponse, raw)
                    self._state.feed(part, data, take(shared, part))
                    self._moved_at = time.monotonic()
                    self._note_change()
                    yield self._state.ready()
                    self._moved_at = time.monotonic()  # The time that the caller took is not the server's.
                elif group := self._state.ready():
                    yield group
                    self._moved_at = time.monotonic()
            # Nothing is owed any more: a server that is slow to end the call takes nothing from the answers.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(writer, self._settings.item_timeout_s)
                await asyncio.wait_for(read or call.read(), self._settings.item_timeout_s)
        except grpc.RpcError as exc:
            error = translate(exc, self._server, None, resumable=True)
            if not self._state.accepted and int(error.code) != exc.code().value[0]:
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
        method = self._channel.unary_unary(SERVICE + "GetModelInfo", None, None)
        try:
            await method(b"", metadata=self._settings.metadata, timeout=self._settings.item_timeout_s)
        except grpc.RpcError as exc:
            return translate(exc, self._server, self._settings.item_timeout_s)
        return error

    async def _wait(self, read: asyncio.Task[Any]) -> None:
        """Waits until a message, an item or the end of all items has come."""
        if not self._state.unanswered_count:
            self._moved_at = time.monotonic()
        changed = asyncio.create_task(self._change(self._change_count))
        left = self._moved_at + self._settings.item_timeout_s - time.monotonic()
        try:
            await asyncio.wait({read, changed}, timeout=max(left, 0.0), return_when=asyncio.FIRST_COMPLETED)
            if not read.done() and not changed.done() and self._state.unanswered_count:
                raise DeadlineExceededError(
                    f"no answer came for {self._settings.item_timeout_s} s while {self._state.unanswered_count} items "
                    "wait; raise item_timeout_s if the server needs longer"
                )
        finally:
            changed.cancel()

    async def _write(self, call: Any, shared: SharedCall | None) -> None:
        # The reading side gets the status of a broken call and tells it.
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            opening = self._state.opening
            if shared is not None:
                opening.options.options.shared_memory.CopyFrom(shared.use)
            await call.write(opening.SerializeToString())
            # A write that meets a refusal would hide its reason: see first whether the options are accepted.
            while not self._state.accepted and not self._finished:
                await self._change(self._change_count)
            while not self._finished:
                while self._state.has_unsent:
                    await call.write(self._state.take().SerializeToString())
                if not self._finished:
                    await self._change(self._change_count)
            await call.done_writing()

    def _note_change(self) -> None:
        self._change_count += 1
        self._changed.set()

    async def _change(self, since: int) -> None:
        """Waits until something has changed since `_change_count` was that."""
        while self._change_count == since:
            self._changed.clear()
            await self._changed.wait()

    async def _read_items(self) -> None:
        try:
            async with contextlib.aclosing(input_reader.groups(self._items)) as groups:
                async for group in groups:
                    for item in group:
                        while not self._state.has_room:
                            await self._change(self._change_count)
                        self._state.offer(item)
                        self._note_change()
        except asyncio.CancelledError as exc:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # Ours: the stream is ending. Else something that the items waited for was cancelled.
            self._source_error = exc
        except BaseException as exc:  # The caller's own; it reaches the caller as itself.
            self._source_error = exc
        finally:
            self._source_ended = True
            self._note_change()
