"""One caller's texts in the queue, and what an instance tells the caller of them.

Pure: the state of a call is changed by the batcher, under its lock, and by nobody else.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from layertap.errors import LayertapError
from layertap_server.types import Plan, Rows, Text


class Queue(Protocol):
    """What a call asks of the batcher."""

    def add(self, call: Call, texts: Sequence[Text], admitted: bool) -> None:
        """Queues texts of a call."""

    def release(self, call: Call, byte_count: int, run_done: bool) -> None:
        """Takes back what a call held."""

    def close(self, call: Call) -> None:
        """Forgets a call."""


@dataclasses.dataclass(frozen=True, slots=True)
class RowsReady:
    """One layer of one output of some texts is there. `first_text` is their position in the call."""

    first_text: int
    texts: Sequence[Text]
    rows: Rows


@dataclasses.dataclass(frozen=True, slots=True)
class RunDone:
    """All outputs of some texts have been delivered. `started_at_ns`: when their batch began, by time.monotonic_ns."""

    first_text: int
    texts: Sequence[Text]
    started_at_ns: int
    queue_time_ns: int
    compute_time_ns: int
    reserved_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class CallFailed:
    """The call will get nothing more."""

    error: LayertapError


Event: TypeAlias = RowsReady | RunDone | CallFailed


class Call:
    """One caller's texts, from admission to the last answer. Made by `Batcher.open`."""

    def __init__(
        self,
        queue: Queue,
        plan: Plan,
        *,
        client: str,
        connection: str = "",
        deliver: Callable[[Event], None],
        expires_at: float | None,
    ) -> None:
        self.plan = plan
        self.client = client
        self.connection = connection
        self.deliver = deliver
        self.expires_at = expires_at
        self.waiting: deque[tuple[Text, int]] = deque()
        self.waiting_token_count = 0
        self.next_text = 0
        self.held_bytes = 0
        self.held_run_count = 0
        self.closed = False
        self._byte_counts = plan.byte_counts
        self._queue = queue

    def add(self, texts: Sequence[Text], *, admitted: bool = False) -> None:
        """Queues texts.

        Args:
            texts: They follow those of earlier calls of `add`.
            admitted: Whether the call has been admitted before; then a full queue does not refuse it.

        Raises:
            ResourceExhaustedError: The queue is full.
            UnavailableError: The server is stopping, or its engine has failed.
        """
        self._queue.add(self, texts, admitted)

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
class Taken:
    """What one batch takes of one call."""

    call: Call
    first_text: int
    texts: list[Text]
    reserved_bytes: int
    admitted_at_ns: int
