"""`embed_stream` on the wire: reads the items, spreads them over connections, and hands out what comes back.

One asyncio implementation serves both clients; `sync_bridge` lends it to synchronous callers. What to send and what
came back is the business of `StreamState`, and each connection that of `stream_calls`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterable, Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any

from layertap._protocol.inputs import InputItem
from layertap._protocol.stream_state import StreamState
from layertap._transport import input_reader
from layertap._transport.settings import Connection, StreamSettings
from layertap._transport.stream_calls import Endpoint, StreamCalls, StreamProgress
from layertap.results.streamed import StreamResult
from layertap.v1 import embedding_pb2 as pb

Items = Iterable[InputItem] | AsyncIterable[InputItem] | list[pb.Input]
More = Callable[[], Awaitable[Sequence[Endpoint]]]
"""Returns the connections that a long stream may use beside the first."""


class EmbedStream:
    """One `embed_stream`, on the running loop: `next_group` until it returns none, and `close` in any case.

    It is no generator: an event loop that ends closes all of them at once, each without regard to what it runs.

    Args:
        endpoint: The connection that it begins over. What that meets is the stream's fate.
        more: Asked for further ones once there are more items than one connection sends at once.
        connection: What the client is.
        state: The items.
        items: Where they come from.
        settings: What its calls are sent with.
    """

    def __init__(
        self,
        *,
        endpoint: Endpoint,
        more: More,
        connection: Connection,
        state: StreamState,
        items: Items,
        settings: StreamSettings,
    ) -> None:
        self._endpoint = endpoint
        self._more = more
        self._server = connection
        self._settings = settings
        self._state = state
        state.expected_count = None
        self._items = items
        self._progress = StreamProgress(state)
        self._source_error: BaseException | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._spreading: asyncio.Task[None] | None = None
        self._failed: asyncio.Task[None] | None = None

    async def next_group(self) -> list[StreamResult]:
        """Returns the next answers, as they come; none at the end.

        Raises:
            DeadlineExceededError: if no item was answered or read for item_timeout_s.
            UnavailableError: if no server answered, at first or for reconnect_timeout_s.
            Exception: if the items raise it; it comes after the answers to all items before it.
        """
        progress = self._progress
        if self._spreading is None:
            self._start(self._read_items())
            self._start(self._calls(self._endpoint).run())
            self._spreading = self._start(self._spread())
        progress.note_change()  # The caller has taken the last group.
        await progress.until(lambda: self._state.has_ready or bool(self._failed) or progress.finished)
        if group := self._state.ready():
            return group
        if self._failed:
            self._failed.result()
        # Nothing is owed any more: what a call meets at its end takes nothing from the answers.
        self._spreading.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._source_error is not None:
            raise self._source_error
        return []

    async def close(self) -> None:
        """Ends all calls, and stops reading the items."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _calls(self, endpoint: Endpoint) -> StreamCalls:
        return StreamCalls(endpoint, server=self._server, settings=self._settings, progress=self._progress)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        task.add_done_callback(self._note_end)
        self._tasks.append(task)
        return task

    def _note_end(self, task: asyncio.Task[None]) -> None:
        if self._failed is None and not task.cancelled() and task.exception():
            self._failed = task
        self._progress.note_change()

    async def _spread(self) -> None:
        """Adds connections once the stream is known to be long."""
        await self._progress.until(lambda: self._state.is_long and self._state.started)
        endpoints = await self._more()
        self._state.expected_count = 1 + len(endpoints)
        self._progress.note_change()
        for endpoint in endpoints:
            self._start(self._calls(endpoint).run_beside())

    async def _read_items(self) -> None:
        progress = self._progress
        try:
            async with contextlib.aclosing(input_reader.groups(self._items)) as groups:
                async for group in groups:
                    for item in group:
                        if not self._state.has_room:
                            progress.note_change()
                            await progress.until(lambda: self._state.has_room)
                        self._state.offer(item)
                    progress.note_change()
        except asyncio.CancelledError as exc:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # Ours: the stream is ending. Else something that the items waited for was cancelled.
            self._source_error = exc
        except BaseException as exc:  # The caller's own; it reaches the caller as itself.
            self._source_error = exc
        finally:
            progress.source_ended = True
            progress.note_change()
