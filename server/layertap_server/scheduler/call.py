"""One caller's texts in the queue, and what is reported of them: events to the call, hooks to the server.

The queue changes the state of a call, under its lock. An instance reports to a call by events, which cross from its
thread into the event loop of the call. Of what is behind the hooks nothing is known where they are called.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, TypeVar

from layertap_server.scheduler.events import Event, RowsReady
from layertap_server.scheduler.windows import TextEvents
from layertap_server.types import Allocator, Plan, Text

if TYPE_CHECKING:
    from layertap_server.scheduler.call_queue import CallQueue

EventT = TypeVar("EventT")


class WaitingText(NamedTuple):
    """A text in the queue.

    Attributes:
        admitted_at_ns: When it was queued, by time.monotonic_ns.
        arrival: The number of what it was queued with, among all that was queued.
    """

    text: Text
    admitted_at_ns: int
    arrival: int


class Call:
    """One caller's texts, from admission to the last answer. Made by `Batcher.open`.

    Attributes:
        waiting: Texts in the queue.
        arrival: That of its first waiting text.
        next_text: The position of the first waiting text.
        next_window: The first of its windows that is not yet taken.
        held_bytes: Output bytes that are reserved or not yet sent.
        held_run_count: Runs that hold them.
    """

    def __init__(
        self,
        queue: CallQueue,
        plan: Plan,
        *,
        client: str,
        connection: str = "",
        deliver: Callable[[Event], None],
        wake: Callable[[], None] = lambda: None,
        expires_at: float | None = None,
        allocator: Allocator | None = None,
        keeps_rows: bool = True,
    ) -> None:
        """Starts without texts.

        Args:
            queue: Where its texts wait.
            plan: The outputs of its texts.
            client: Its client; see `fairness`.
            connection: Its connection among those of the client.
            deliver: Called with each event, in the thread of an instance; must not block.
            wake: Called after one or several of them, likewise.
            expires_at: Its deadline, by time.monotonic. None: it has none.
            allocator: Where its rows are written. None: in any buffer.
            keeps_rows: Whether token rows of a text that runs as windows come all at once.
        """
        self.plan = plan
        self.allocator = allocator
        self.client = client
        self.connection = connection
        self.deliver = deliver
        self.wake = wake
        self.expires_at = expires_at
        self.waiting: deque[WaitingText] = deque()
        self.waiting_token_count = 0
        self.arrival = 0
        self.next_text = 0
        self.next_window = 0
        self.held_bytes = 0
        self.held_run_count = 0
        self.closed = False
        self._byte_counts = plan.byte_counts
        self._queue = queue
        self._part: tuple[Text, Text] | None = None
        self._window_bytes = 0
        if plan.of_windows is not None:
            events = TextEvents(plan, self.release, deliver, keeps_rows=keeps_rows, apply_modules=queue.apply_modules)
            self.deliver = events.deliver

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def report(self, event: Event) -> None:
        """Delivers an event and wakes its reader."""
        self.deliver(event)
        self.wake()

    def add(self, texts: Sequence[Text], *, waits: bool = False) -> bool:
        """Queues texts.

        Args:
            texts: They follow those of earlier calls of `add`.
            waits: Whether the call can wait while the queue is full. It then gets a `QueueRoom` event, after which it
                may try again.

        Returns:
            Whether the texts are queued.

        Raises:
            ResourceExhaustedError: if the queue is full, and the call does not wait.
            UnavailableError: if the server is stopping, or its engine has failed.
        """
        return self._queue.add(self, texts, waits)

    def release(self, byte_count: int, *, run_done: bool = False) -> None:
        """Gives back output bytes that have been sent, and with `run_done` the run's place."""
        self._queue.release(self, byte_count, run_done)

    def close(self) -> None:
        """Drops what still waits and gives everything back; the call gets no further events."""
        self._queue.close(self)

    def bytes_of(self, text: Text) -> int:
        """Returns the output bytes of one text, or of a window of one."""
        return self._byte_counts.of(text) if text.window is None else self.plan.of(text).byte_counts.of(text)

    @property
    def next_part(self) -> Text:
        """The first waiting text, or its first window that is not yet taken."""
        text = self.waiting[0].text
        if text.windows is None:
            return text
        if self._part is None or self._part[0] is not text:
            self._part = text, text.part(self.next_window)
            self._window_bytes = 0 if self.next_window else self.plan.held_bytes(text)
        return self._part[1]

    def take_part(self) -> None:
        """Removes that from those that wait."""
        text = self.waiting[0].text
        self._part = None
        self.next_window += 1
        if text.windows is None or self.next_window == text.windows.count:
            self.waiting.popleft()
            self.next_text += 1
            self.next_window = 0

    @property
    def next_part_bytes(self) -> int:
        """The bytes to reserve for `next_part`: the first window of a text reserves for all of them."""
        part = self.next_part
        return self._byte_counts.of(part) if part.window is None else self._window_bytes


@dataclasses.dataclass(slots=True)
class BatchPart:
    """The texts of one call in one batch.

    Attributes:
        first_text: The position of the first text in the call.
        reserved_bytes: The output bytes reserved for them.
        admitted_at_ns: When the first of them was queued, by time.monotonic_ns.
    """

    call: Call
    first_text: int
    texts: list[Text]
    reserved_bytes: int
    admitted_at_ns: int

    @property
    def token_count(self) -> int:
        """The tokens of the texts."""
        return sum([len(text.input_ids) for text in self.texts])


REASONS: Final = (
    "calls",
    "request_bytes",
    "queue_texts",
    "queue_tokens",
    "stopping",
    "no_instances",
    "unauthenticated",
)
"""Why calls are refused."""


class Hooks:
    """Called from any thread, and must be quick; these do nothing."""

    def ran(self, batch: Sequence[BatchPart], *, started_at_ns: int, compute_time_ns: int) -> None:
        """An instance has run a batch; the time of its pauses is left out."""

    def refused(self, reason: str) -> None:
        """A call was refused; the reason is one of `REASONS`."""


class LoopWaker:
    """Wakes an event loop once for all that has come in since the last time: each wake costs."""

    def __init__(self) -> None:
        self._callbacks: deque[Callable[[], None]] = deque()
        self._scheduled = False

    @functools.cached_property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop: that in which this was first asked for, which `EventQueue.take` does before it waits."""
        return asyncio.get_running_loop()

    def add(self, callback: Callable[[], None]) -> None:
        """Notes what the loop runs once it is woken; may be called from any thread."""
        self._callbacks.append(callback)

    def wake(self) -> None:
        """Wakes the loop if there is anything for it; may be called from any thread."""
        if self._callbacks and not self._scheduled:
            self._scheduled = True
            try:
                self.loop.call_soon_threadsafe(self._run)
            except RuntimeError:  # The loop has closed: no call waits any more.
                self._callbacks.clear()

    def _run(self) -> None:
        self._scheduled = False  # First: whatever comes from here on schedules anew, so that nothing is missed.
        while self._callbacks:
            self._callbacks.popleft()()


class EventQueue(Generic[EventT]):
    """Events of one call: put from any thread, read in the call's own event loop.

    Attributes:
        wake: Lets the reader go on with what was added; several queues of a loop share it.
    """

    def __init__(self, waker: LoopWaker, *, needs_rows: bool = True) -> None:
        """Starts empty. With `needs_rows` the reader goes on with each layer, else once a run is done."""
        self.wake = waker.wake
        self._waker = waker
        self._needs_rows = needs_rows
        self._events: deque[EventT] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._waits = self._waking = False

    def put(self, event: EventT) -> None:
        """Adds an event and wakes the reader; may be called from any thread."""
        self.add(event)
        self.wake()

    def add(self, event: EventT) -> None:
        """Adds an event; may be called from any thread. The reader goes on with it after `wake`."""
        self._events.append(event)
        # A reader that does not wait finds it by itself: it looks once more after it has said that it waits.
        if self._waits and not self._waking and (self._needs_rows or not isinstance(event, RowsReady)):
            self._waking = True
            self._waker.add(self._go_on)

    def _go_on(self) -> None:
        self._waking = False
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def take(self) -> list[EventT]:
        """Returns all events that have come; waits for the first one."""
        while not self._events:
            self._reader = self._waker.loop.create_future()
            self._waits = True
            if not self._events:
                await self._reader
            self._waits = False
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events
