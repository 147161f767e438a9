"""A call under way and its other end: what it holds of the memory for requests, whether it is idle, what it sends.

`AdmittedCall` knows no protocol; `Caller` is one over gRPC. Rules:
- A call is idle while it waits for a message of its caller and owes no answer. Such a call ends after a time, and
  sooner if another needs its place: silence cannot keep other callers out.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, Final

import grpc.aio

from layertap.errors import (
    CancelledError,
    DeadlineExceededError,
    InvalidArgumentError,
    LayertapError,
    UnavailableError,
)
from layertap_server.observability.call_log import Record
from layertap_server.rpc.stream_memory import StreamMemory
from layertap_server.scheduler.fairness import Reads, RequestMemory
from layertap_server.types import RETRY_ELSEWHERE_S

Context = grpc.aio.ServicerContext[bytes, bytes]

_LEAST_WAIT_S: Final = 0.05
"""The shortest time between two looks at the calls that are idle."""

_NEAR_S: Final = 0.05
"""A caller's clock ends a call a little before ours does: what is cancelled so near to its deadline has met it."""


class Deadlines:
    """Ends calls that wait for too long, with one timer for all: one for each would cost every short call."""

    def __init__(self) -> None:
        self._deadlines: dict[AdmittedCall, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._next = math.inf

    def add(self, call: AdmittedCall, deadline: float) -> None:
        """Ends a call at this time, by time.monotonic, unless it is removed before."""
        self._deadlines[call] = deadline
        if deadline < self._next:
            self._set_timer(deadline)

    def remove(self, call: AdmittedCall) -> None:
        """Ends a call no more."""
        self._deadlines.pop(call, None)

    def _set_timer(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._next = deadline
        self._timer = asyncio.get_running_loop().call_later(deadline - time.monotonic(), self._end_late)

    def _end_late(self) -> None:
        now = time.monotonic()
        self._timer, self._next = None, math.inf
        for call in [call for call, deadline in self._deadlines.items() if deadline <= now]:
            del self._deadlines[call]
            call.end_late()
        if self._deadlines:
            self._set_timer(max(min(self._deadlines.values()), now + _LEAST_WAIT_S))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What the calls of a server share.

    Attributes:
        memory: The memory for their requests.
        streams: The memory for what streams have read.
        deadlines: Ends those that wait for too long.
        reads: The messages that come in at once.
        stall_timeout_s: How long a request may take to come, and an answer may stay unread, in seconds.
        idle_timeout_s: How long a stream may be idle, in seconds.
    """

    memory: RequestMemory
    streams: StreamMemory
    deadlines: Deadlines
    reads: Reads
    stall_timeout_s: float
    idle_timeout_s: float


class AdmittedCall:
    """A call under way.

    Attributes:
        record: What is known of it.
        client: The client whose share it uses.
        connection: What tells the client's connections apart.
        ending: The error that it ends with, once it has been ended from outside.
    """

    def __init__(self, record: Record, task: asyncio.Task[Any], shared: Shared, *, connection: str) -> None:
        self.record, self.client, self.connection = record, record.client, connection
        self.ending: LayertapError | None = None
        self._task = task
        self._shared = shared
        self._idle_error: Callable[[], LayertapError] | None = None
        self._byte_count = self._stream_byte_count = 0
        self._idle_since: float | None = None

    @property
    def expires_at(self) -> float | None:
        """The deadline of the call, by time.monotonic; None: it has none."""
        return None

    @property
    def idle_s(self) -> float:
        """How long it has been idle, in seconds; 0: it is not."""
        return 0.0 if self._idle_since is None else time.monotonic() - self._idle_since

    def add_bytes(self, byte_count: int) -> None:
        """Counts memory that the request takes, which is given back when the call ends.

        Raises:
            ResourceExhaustedError: if the requests of all calls would take too much.
        """
        self._shared.memory.add(self.client, byte_count)
        self._byte_count += byte_count

    def add_stream_bytes(self, byte_count: int) -> None:
        """Counts memory that what a stream has read takes, or with a negative number gives it back."""
        self._stream_byte_count += byte_count
        self._shared.streams.add(self.client, byte_count)

    @property
    def has_stream_room(self) -> bool:
        """Whether a stream may read more."""
        return self._shared.streams.has_room(self.client)

    async def stream_room(self) -> None:
        """Waits until a stream may read more."""
        await self._shared.streams.room(self.client)

    def expect_request(self) -> None:
        """Notes that the call is idle until `set_busy`: its request is to come whole within the stall timeout."""
        self.set_idle(self._shared.stall_timeout_s, self._late_error)

    def set_idle(self, timeout_s: float, error: Callable[[], LayertapError]) -> None:
        """Notes that the call is idle; after so many seconds it ends with an error, which `error` then makes."""
        now = time.monotonic()
        self._idle_since, self._idle_error = now, error
        self._shared.deadlines.add(self, now + timeout_s)

    def set_busy(self) -> None:
        """Notes that the call is no longer idle."""
        if self._idle_since is not None:
            self._idle_since = self._idle_error = None
            self._shared.deadlines.remove(self)

    def end_late(self) -> None:
        """Ends the call, which has been idle for too long, or whose only message gRPC could not send."""
        if self._idle_error is not None:
            self.end(self._idle_error())
        else:
            self._task.cancel()

    def end(self, error: LayertapError) -> None:
        """Ends the call with an error."""
        if self.ending is None:
            self.ending = error
            self._task.cancel()

    def close(self) -> None:
        """Gives back what the call holds."""
        if self._idle_since is not None:
            self.set_busy()
        self._shared.memory.give_back(self.client, self._byte_count)
        if self._stream_byte_count:
            self._shared.streams.add(self.client, -self._stream_byte_count)

    def why_left(self) -> LayertapError:
        """Returns why the caller no longer waits."""
        return CancelledError("the caller has left")

    def fail(self, error: LayertapError) -> LayertapError:
        """Records the error that the call ends with; returns it with the call's request_id."""
        self.record.fail(error)
        error.request_id = self.record.request_id
        return error

    def _late_error(self) -> LayertapError:
        return DeadlineExceededError(
            f"the request did not come whole within {self._shared.stall_timeout_s:g} s; send it faster, or in parts"
        )


class CallerLeftError(Exception):
    """A message could not be sent, because its call is gone."""


class Caller(AdmittedCall):
    """A call over gRPC, and its other end."""

    def __init__(self, context: Context, peer: str, record: Record, task: asyncio.Task[Any], shared: Shared) -> None:
        # All connections over a unix socket look the same: there each call counts as one.
        super().__init__(record, task, shared, connection=f"{peer}#{id(self)}" if peer.startswith("unix") else peer)
        self._context = context

    @property
    def expires_at(self) -> float | None:
        """The deadline of the call, by time.monotonic; None: it has none."""
        remaining = self._context.time_remaining()  # grpc-stubs does not know that it may be None.
        return None if remaining is None else time.monotonic() + remaining  # type: ignore[redundant-expr]

    def why_left(self) -> LayertapError:
        """Returns why the caller no longer waits."""
        if (expires_at := self.expires_at) is not None and expires_at - time.monotonic() < _NEAR_S:
            return DeadlineExceededError("the caller's deadline has passed")
        return super().why_left()

    async def read_first(self) -> bytes:
        """Returns the first message, and counts its bytes until the call ends.

        Raises:
            InvalidArgumentError: if there is none.
            ResourceExhaustedError: if the requests of all calls would have too many bytes.
        """
        self.expect_request()
        message = await self.read()
        self.set_busy()
        if message is None:
            raise InvalidArgumentError("the first message is missing; send the request, or of EmbedStream the options")
        self.add_bytes(len(message))
        return message

    async def read(self) -> bytes | None:
        """Returns the next message; None: there is none."""
        reads = self._shared.reads
        if not reads.try_begin(self.client, self):
            await reads.begin(self.client, self)
        try:
            message = await self._context.read()
        finally:
            reads.end(self.client, self)
        # grpc-stubs does not know that it may be EOF.
        return message if isinstance(message, bytes) else None  # type: ignore[redundant-expr]

    def set_waiting(self, waiting: bool) -> None:
        """Notes whether a stream waits for its caller and owes no answer."""
        if not waiting:
            self.set_busy()
        elif self._idle_since is None:
            self.set_idle(self._shared.idle_timeout_s, self._stream_error)

    def _stream_error(self) -> LayertapError:
        return UnavailableError(
            f"the stream was idle for {self._shared.idle_timeout_s:g} s; open it again when there is more to send",
            retry_after_s=RETRY_ELSEWHERE_S,
        )

    async def write(self, message: bytes) -> None:
        """Sends one message; waits while the caller does not read, but not for ever."""
        started_at_ns = time.monotonic_ns()
        try:
            async with asyncio.timeout(self._shared.stall_timeout_s):
                await self._context.write(message)
        except TimeoutError as exc:
            self.record.stalled = True
            raise DeadlineExceededError(
                f"the answer was not read for {self._shared.stall_timeout_s:g} s; read faster, or ask for less"
            ) from exc
        except Exception as exc:  # gRPC's own; it has no public name.
            raise CallerLeftError from exc
        self.record.send.note(started_at_ns, time.monotonic_ns())
        self.record.sent_bytes += len(message)
