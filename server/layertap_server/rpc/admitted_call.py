"""A call under way, whatever its protocol: what it holds of the memory for requests, and whether it is idle.

A call is idle while it waits for a message of its caller and owes no answer. Such a call ends after a time, and sooner
if another needs its place: silence cannot keep other callers out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

from layertap.errors import LayertapError, ResourceExhaustedError
from layertap_server.observability.call_log import Record
from layertap_server.scheduler.budget import Budget
from layertap_server.scheduler.hooks import Hooks
from layertap_server.types import RETRY_FULL_S

_LEAST_WAIT_S: Final = 0.05
"""The shortest time between two looks at the calls that are idle."""


class RequestMemory:
    """The memory for the requests of all calls; see `Budget` for what is kept for light clients.

    Streams have as much again to themselves: what they read counts when it has come, so that they may take more than
    their limit by a message each, and others must not be refused for that.
    """

    def __init__(self, limit: int, hooks: Hooks) -> None:
        self._requests = Budget(limit)
        self._streams = Budget(limit)
        self._hooks = hooks
        self._freed = asyncio.Event()

    def add(self, client: str, byte_count: int) -> None:
        """Counts bytes of a request.

        Raises:
            ResourceExhaustedError: if the client may not hold so many more.
        """
        if not self._requests.has_room(client, byte_count):
            self._hooks.refused("request_bytes")
            raise ResourceExhaustedError(
                f"the server is full: the requests under way take {self._requests.used} bytes, the most is "
                f"{self._requests.limit}; try again later",
                retry_after_s=RETRY_FULL_S,
            )
        self._requests.add(client, byte_count)

    def add_stream(self, client: str, byte_count: int) -> None:
        """Counts bytes of a stream, or with a negative number gives them back."""
        self._streams.add(client, byte_count)
        if byte_count < 0:
            self._freed.set()

    def give_back(self, client: str, byte_count: int, stream_byte_count: int) -> None:
        """Gives back all that a call holds."""
        if byte_count:
            self._requests.add(client, -byte_count)
        if stream_byte_count:
            self.add_stream(client, -stream_byte_count)

    def has_stream_room(self, client: str) -> bool:
        """Returns whether streams of a client may hold more; one that holds nothing always may."""
        return self._streams.has_room(client, 1) or not self._streams.used_by(client)

    async def stream_room(self, client: str) -> None:
        """Waits until streams of a client may hold more."""
        while not self.has_stream_room(client):
            self._freed.clear()
            await self._freed.wait()


class IdleCalls:
    """Ends calls that are idle for too long, with one timer for all: one for each would cost every short call."""

    def __init__(self) -> None:
        self._deadlines: dict[AdmittedCall, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, call: AdmittedCall, timeout_s: float) -> None:
        """Ends a call in so many seconds, unless it is removed before."""
        loop = asyncio.get_running_loop()
        self._deadlines[call] = deadline = loop.time() + timeout_s
        if self._timer is None or deadline < self._timer.when():
            if self._timer is not None:
                self._timer.cancel()
            self._timer = loop.call_at(deadline, self._end_late, loop)

    def remove(self, call: AdmittedCall) -> None:
        """Ends a call no more."""
        self._deadlines.pop(call, None)

    def _end_late(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        self._timer = None
        for call in [call for call, deadline in self._deadlines.items() if deadline <= now]:
            del self._deadlines[call]
            call.end_idle()
        if self._deadlines:
            at = max(min(self._deadlines.values()), now + _LEAST_WAIT_S)
            self._timer = loop.call_at(at, self._end_late, loop)


class AdmittedCall:
    """A call under way.

    Attributes:
        record: What is known of it.
        ending: The error that it ends with, once it has been ended from outside.
    """

    def __init__(self, record: Record, task: asyncio.Task[Any], memory: RequestMemory, idle_calls: IdleCalls) -> None:
        self.record = record
        self.ending: LayertapError | None = None
        self._task = task
        self._memory = memory
        self._idle_calls = idle_calls
        self._idle_error: Callable[[], LayertapError] | None = None
        self._byte_count = self._stream_byte_count = 0
        self._idle_since: float | None = None

    @property
    def client(self) -> str:
        """The client whose share it uses."""
        return self.record.client

    @property
    def is_idle(self) -> bool:
        """Whether it is idle."""
        return self._idle_since is not None

    @property
    def idle_s(self) -> float:
        """How long it has been idle, in seconds; 0: it is not."""
        return 0.0 if self._idle_since is None else time.monotonic() - self._idle_since

    def add_bytes(self, byte_count: int) -> None:
        """Counts memory that the request takes, which is given back when the call ends.

        Raises:
            ResourceExhaustedError: if the requests of all calls would take too much.
        """
        self._memory.add(self.client, byte_count)
        self._byte_count += byte_count

    def add_stream_bytes(self, byte_count: int) -> None:
        """Counts memory that what a stream has read takes, or with a negative number gives it back."""
        self._stream_byte_count += byte_count
        self._memory.add_stream(self.client, byte_count)

    @property
    def has_stream_room(self) -> bool:
        """Whether a stream may read more."""
        return self._memory.has_stream_room(self.client)

    async def stream_room(self) -> None:
        """Waits until a stream may read more."""
        await self._memory.stream_room(self.client)

    def set_idle(self, timeout_s: float, error: Callable[[], LayertapError]) -> None:
        """Notes that the call is idle; after so many seconds it ends with an error, which `error` then makes."""
        self._idle_since = time.monotonic()
        self._idle_error = error
        self._idle_calls.add(self, timeout_s)

    def set_busy(self) -> None:
        """Notes that the call is no longer idle."""
        if self._idle_since is not None:
            self._idle_since = self._idle_error = None
            self._idle_calls.remove(self)

    def end_idle(self) -> None:
        """Ends the call, which has been idle for too long."""
        if self._idle_error is not None:
            self.end(self._idle_error())

    def end(self, error: LayertapError) -> None:
        """Ends the call with an error."""
        if self.ending is None:
            self.ending = error
            self._task.cancel()

    def end_in(self, seconds: float) -> None:
        """Ends the call after so many seconds, unless gRPC has sent its only message by then."""
        timer = asyncio.get_running_loop().call_later(seconds, self._task.cancel)
        self._task.add_done_callback(lambda _: timer.cancel())

    def close(self) -> None:
        """Gives back what the call holds."""
        self.set_busy()
        self._memory.give_back(self.client, self._byte_count, self._stream_byte_count)

    def fail(self, error: LayertapError) -> LayertapError:
        """Records the error that the call ends with; returns it with the call's request_id."""
        self.record.fail(error)
        error.request_id = self.record.request_id
        return error
