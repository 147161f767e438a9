"""What an instance reports to a call, and how it crosses from the instance's thread into the call's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeAlias, TypeVar

from layertap.errors import LayertapError
from layertap_server.types import Rows, Text

EventT = TypeVar("EventT")


@dataclasses.dataclass(frozen=True, slots=True)
class RowsReady:
    """One layer of one output of some texts is ready.

    Attributes:
        first_text: The position of the first of the texts in the call.
        texts: The texts.
        rows: Their rows.
    """

    first_text: int
    texts: Sequence[Text]
    rows: Rows


@dataclasses.dataclass(frozen=True, slots=True)
class RunDone:
    """All outputs of some texts have been delivered.

    Attributes:
        first_text: The position of the first of the texts in the call.
        texts: The texts.
        started_at_ns: When their batch began, by time.monotonic_ns.
        queue_time_ns: How long the first of them had waited.
        compute_time_ns: How long the batch took.
        reserved_bytes: The output bytes that were reserved for them.
    """

    first_text: int
    texts: Sequence[Text]
    started_at_ns: int
    queue_time_ns: int
    compute_time_ns: int
    reserved_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class CallFailed:
    """The call has failed; no event follows."""

    error: LayertapError


@dataclasses.dataclass(frozen=True, slots=True)
class QueueRoom:
    """The queue may have room again for a call that waits for it."""


Event: TypeAlias = RowsReady | RunDone | CallFailed | QueueRoom


class LoopWaker:
    """Wakes the event loop that it was made in, once for all that has come in since the last time: each wake costs."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._callbacks: deque[Callable[[], None]] = deque()
        self._scheduled = False

    def call(self, callback: Callable[[], None]) -> None:
        """Runs `callback` in the loop; may be called from any thread."""
        self._callbacks.append(callback)
        if not self._scheduled:
            self._scheduled = True
            with contextlib.suppress(RuntimeError):  # The loop has closed: no call waits any more.
                self._loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        self._scheduled = False  # First: whatever comes from here on schedules anew, so that nothing is missed.
        while self._callbacks:
            self._callbacks.popleft()()


class EventQueue(Generic[EventT]):
    """Events of one call: put from any thread, read in the call's own event loop."""

    def __init__(self, waker: LoopWaker) -> None:
        self._waker = waker
        self._events: deque[EventT] = deque()
        self._arrived = asyncio.Event()
        self._waking = False

    def put(self, event: EventT) -> None:
        """Adds an event; may be called from any thread."""
        self._events.append(event)
        if not self._waking:
            self._waking = True
            self._waker.call(self._wake)

    def _wake(self) -> None:
        self._waking = False
        self._arrived.set()

    async def take(self) -> list[EventT]:
        """Returns all events that have come; waits for the first one."""
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events
