"""The caller's own iterable, read beside the loop that sends what it gives.

An async iterable is read on the loop. A plain one may block, so a daemon thread reads it: each item is handed over
before the next is requested, the thread waits while none are taken, and one that hangs in the caller's code keeps
nothing else from ending.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from typing import Any, Final

from layertap._protocol.inputs import check_items

_AHEAD_COUNT: Final = 512
"""How many items the thread may be ahead of the loop."""


async def groups(source: Iterable[Any] | AsyncIterable[Any]) -> AsyncGenerator[list[Any], None]:
    """Yields the items of an iterable in groups, each as soon as it is there.

    Raises:
        InvalidArgumentError: if the iterable is one text or a table.
        Exception: if the iterable raises it; it comes after all items before it.
    """
    if isinstance(source, AsyncIterable):
        async for item in source:
            yield [item]
        return
    check_items(source)
    pump = _Pump(source)
    try:
        while group := await pump.take():
            yield group
    finally:
        pump.stop()


class _Pump:
    def __init__(self, source: Iterable[Any]) -> None:
        self._source = source
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._room = threading.Semaphore(_AHEAD_COUNT)
        self._items: deque[Any] = deque()
        self._error: BaseException | None = None
        self._ended = self._stopped = False
        threading.Thread(target=self._run, name="layertap-source", daemon=True).start()

    async def take(self) -> list[Any]:
        """Returns what is there, at least one item; an empty list at the end."""
        while True:
            # Cleared before it is looked: what comes after the look sets it again.
            self._arrived.clear()
            if self._items or self._ended:
                break
            await self._arrived.wait()
        group = []
        while self._items:
            group.append(self._items.popleft())
        if group:
            self._room.release(len(group))
        elif self._error is not None:
            raise self._error
        return group

    def stop(self) -> None:
        self._stopped = True
        self._room.release()

    def _run(self) -> None:
        try:
            for item in self._source:
                self._room.acquire()
                if self._stopped:
                    return
                self._items.append(item)
                self._wake()
        except BaseException as exc:  # Raised again where the caller can see it.
            self._error = exc
        finally:
            self._ended = True
            self._wake()

    def _wake(self) -> None:
        if self._arrived.is_set() or self._stopped:
            return
        try:
            self._loop.call_soon_threadsafe(self._arrived.set)
        except RuntimeError:  # The loop has closed: the stream has ended.
            self._stopped = True
