"""From the threads of the instances into a call's event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

EventT = TypeVar("EventT")


class Doorbell:
    """Wakes the event loop it was made in: once for all that has come in meanwhile, since each waking costs."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._wanted: deque[Callable[[], None]] = deque()
        self._ringing = False

    def ring(self, wake: Callable[[], None]) -> None:
        """Has `wake` called in the loop, from any thread."""
        self._wanted.append(wake)
        if not self._ringing:
            self._ringing = True
            with contextlib.suppress(RuntimeError):  # The loop has closed: nobody waits any more.
                self._loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        self._ringing = False  # First: who comes from here on rings anew, so that nobody is missed.
        while self._wanted:
            self._wanted.popleft()()


class Inbox(Generic[EventT]):
    """Events of one call, put from any thread, read in the call's own event loop."""

    def __init__(self, doorbell: Doorbell) -> None:
        self._doorbell = doorbell
        self._events: deque[EventT] = deque()
        self._arrived = asyncio.Event()
        self._rung = False

    def put(self, event: EventT) -> None:
        """Takes an event, from any thread."""
        self._events.append(event)
        if not self._rung:
            self._rung = True
            self._doorbell.ring(self._wake)

    def _wake(self) -> None:
        self._rung = False
        self._arrived.set()

    async def take(self) -> list[EventT]:
        """Returns all events that are there, at least one."""
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events
