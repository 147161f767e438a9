"""The rows of a call: its texts through the queue, and what the instances make of them.

Knows no protocol of callers: what is asked comes as a plan and tokenized texts, whether over gRPC or HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from layertap.errors import LayertapError
from layertap_server.model.tokenized import Tokenized
from layertap_server.observability.call_log import Record
from layertap_server.scheduler.batcher import Batcher
from layertap_server.scheduler.call import Call, EventQueue
from layertap_server.scheduler.events import CallFailed, Event, QueueRoom, RowsReady, RunDone
from layertap_server.types import Allocator, Plan


class Caller(Protocol):
    """The other end of a call, over whatever protocol."""

    record: Record

    @property
    def client(self) -> str:
        """The client whose share the call uses."""

    @property
    def connection(self) -> str:
        """What tells the client's connections apart."""

    @property
    def expires_at(self) -> float | None:
        """The deadline of the call, by time.monotonic; None: it has none."""


def queued(
    batcher: Batcher,
    plan: Plan,
    tokenized: Sequence[Tokenized],
    inbox: EventQueue[Any],
    caller: Caller,
    places: Allocator | None = None,
    *,
    keeps_rows: bool = True,
) -> Call:
    """Returns a call whose texts are queued; as a context it drops what is left of it at its end.

    For `keeps_rows` see `Call`.
    """
    call = batcher.open(
        plan,
        client=caller.client,
        connection=caller.connection,
        deliver=inbox.add,
        wake=inbox.wake,
        expires_at=caller.expires_at,
        allocator=places,
        keeps_rows=keeps_rows,
    )
    texts = [one.text for one in tokenized]
    try:
        call.add(texts)
    except LayertapError:
        call.close()
        raise
    caller.record.take(texts)
    return call


async def collect(
    batcher: Batcher,
    plan: Plan,
    tokenized: Sequence[Tokenized],
    caller: Caller,
    *,
    label: str = "inputs",
) -> list[RowsReady]:
    """Returns all rows of a call that is answered as a whole. The caller of this bounds their bytes.

    Raises:
        LayertapError: if the call, or one of its texts, has failed.
    """
    parts: list[RowsReady] = []
    inbox: EventQueue[Event] = EventQueue(batcher.waker, needs_rows=False)
    call = queued(batcher, plan, tokenized, inbox, caller)
    try:
        left = len(tokenized)
        while left:
            for event in await inbox.take():
                if isinstance(event, RowsReady):
                    parts.append(event if not event.rows.failures else good(event, label=label))
                else:
                    run = done(event)
                    left -= caller.record.run(run)
                    if left:  # What is computed is kept until all is.
                        call.release(run.reserved_bytes, run_done=True)
    finally:
        call.close()
    return parts


def good(event: RowsReady, *, label: str = "inputs") -> RowsReady:
    """Returns rows if no text has failed, else raises the first failure under its place in the request."""
    if event.rows.failures:
        position = min(event.rows.failures)
        error = event.rows.failures[position]
        place = f"{label}[{event.first_text + position}]"
        raise type(error)(f"{place}: {error.details}", retry_after_s=error.retry_after_s)
    return event


def done(event: RunDone | CallFailed | QueueRoom) -> RunDone:
    """Returns the end of a run, or raises the error of a call that has failed."""
    if isinstance(event, CallFailed):
        raise event.error
    assert isinstance(event, RunDone), "only a stream waits for room in the queue"
    return event
