"""One caller's texts in the queue.

Pure; the batcher changes the state of a call, under its lock.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from layertap_server.scheduler.events import Event
from layertap_server.types import Allocator, Plan, Text


class Queue(Protocol):
    """What a call asks of the batcher."""

    def add(self, call: Call, texts: Sequence[Text], waits: bool) -> bool:
        """Queues texts of a call; returns whether it did."""

    def release(self, call: Call, byte_count: int, run_done: bool) -> None:
        """Gives back output bytes of a call."""

    def close(self, call: Call) -> None:
        """Removes a call."""


class WaitingText(NamedTuple):
    """A text in the queue.

    Attributes:
        text: The text.
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
        held_bytes: Output bytes that are reserved or not yet sent.
        held_run_count: Runs that hold them.
    """

    def __init__(
        self,
        queue: Queue,
        plan: Plan,
        *,
        client: str,
        connection: str = "",
        deliver: Callable[[Event], None],
        expires_at: float | None,
        allocator: Allocator | None = None,
    ) -> None:
        self.plan = plan
        self.allocator = allocator
        self.client = client
        self.connection = connection
        self.deliver = deliver
        self.expires_at = expires_at
        self.waiting: deque[WaitingText] = deque()
        self.waiting_token_count = 0
        self.arrival = 0
        self.next_text = 0
        self.held_bytes = 0
        self.held_run_count = 0
        self.closed = False
        self._byte_counts = plan.byte_counts
        self._queue = queue

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
        """Returns the output bytes of one text."""
        return self._byte_counts.of(text)


@dataclasses.dataclass(slots=True)
class BatchPart:
    """The texts of one call in one batch.

    Attributes:
        call: The call.
        first_text: The position of the first text in the call.
        texts: The texts.
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
        return sum(text.token_count for text in self.texts)
