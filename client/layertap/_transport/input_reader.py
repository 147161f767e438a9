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

_AHEAD_COUNT: Final = 512
"""How many items the thread may be ahead of the loop."""


async def groups(source: Iterable[Any] | AsyncIterable[Any]) -> AsyncGenerator[list[Any], None]:
    """Yields the items of an iterable in groups, each as soon as it is there.

    Raises:
        Exception: if the iterable raises it; it comes after all items before it.
    """
    if isinstance(source, AsyncIterable):
        async for item in source:
            yield [item]
        return
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
        self._room = threading.Event()
        self._items: deque[Any] = deque()
        self._error: BaseException | None = None
        self._ended = self._stopped = self._waking = False
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
            self._room.set()
        elif self._error is not None:
            raise self._error
        return group

    def stop(self) -> None:
        self._stopped = True
        self._room.set()

    def _run(self) -> None:
        try:
            for item in self._source:
                while len(self._items) >= _AHEAD_COUNT and not self._stopped:
                    # Cleared before it is looked again: what is taken after the look sets it again.
                    self._room.clear()
                    if len(self._items) >= _AHEAD_COUNT and not self._stopped:
                        self._room.wait()
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
        """Wakes the loop, once for all that has come since the last time: each wake costs."""
        if self._waking or self._stopped:
            return
        self._waking = True
        try:
            self._loop.call_soon_threadsafe(self._arrive)
        except RuntimeError:  # The loop has closed: the stream has ended.
            self._stopped = True

    def _arrive(self) -> None:
        self._waking = False  # First: what comes from here on wakes anew, so that nothing is missed.
        self._arrived.set()
