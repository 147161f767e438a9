"""A call under way, whatever its protocol: what it holds of the memory for requests, and whether it is idle.

A call is idle while it waits for a message of its caller and owes no answer. Such a call ends after a time, and sooner
if another needs its place: silence cannot keep other callers out.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from layertap.errors import LayertapError, ResourceExhaustedError
from layertap_server.observability.call_log import Record
from layertap_server.scheduler.budget import Budget
from layertap_server.scheduler.hooks import Hooks
from layertap_server.types import RETRY_FULL_S


class RequestMemory:
    """The memory for the requests of all calls; see `Budget` for what is kept for light clients."""

    def __init__(self, limit: int, hooks: Hooks) -> None:
        self._budget = Budget(limit)
        self._hooks = hooks
        self._freed = asyncio.Event()

    @property
    def used(self) -> int:
        """Bytes that all calls hold."""
        return self._budget.used

    def add(self, client: str, byte_count: int) -> None:
        """Counts bytes, or with a negative number gives them back."""
        self._budget.add(client, byte_count)
        if byte_count < 0:
            self._freed.set()

    def check(self, client: str, byte_count: int) -> None:
        """Checks that a client may hold so many bytes more.

        Raises:
            ResourceExhaustedError: if it may not.
        """
        if not self._budget.has_room(client, byte_count):
            self._hooks.refused("request_bytes")
            raise ResourceExhaustedError(
                f"the server is full: the requests under way take {self._budget.used} bytes, the most is "
                f"{self._budget.limit}; try again later",
                retry_after_s=RETRY_FULL_S,
            )

    async def room(self, client: str, byte_count: int) -> None:
        """Waits until a client may hold so many bytes more."""
        while not self._budget.has_room(client, byte_count):
            self._freed.clear()
            await self._freed.wait()


class AdmittedCall:
    """A call under way.

    Attributes:
        record: What is known of it.
        ending: The error that it ends with, once it has been ended from outside.
    """

    def __init__(self, record: Record, task: asyncio.Task[Any], memory: RequestMemory) -> None:
        self.record = record
        self.ending: LayertapError | None = None
        self._task = task
        self._memory = memory
        self._held_bytes = 0
        self._idle_since: float | None = None
        self._timer: asyncio.TimerHandle | None = None

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
        self._memory.check(self.client, byte_count)
        self.count(byte_count)

    def count(self, byte_count: int) -> None:
        """Counts memory that the request takes without a check, or with a negative number gives it back."""
        self._held_bytes += byte_count
        self._memory.add(self.client, byte_count)

    async def room(self, byte_count: int = 1) -> None:
        """Waits until `add_bytes` would succeed."""
        await self._memory.room(self.client, byte_count)

    def set_idle(self, timeout_s: float, error: LayertapError) -> None:
        """Notes that the call is idle; after so many seconds it ends with this error."""
        self.set_busy()
        self._idle_since = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self.end, error)

    def set_busy(self) -> None:
        """Notes that the call is no longer idle."""
        self._idle_since = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def end(self, error: LayertapError) -> None:
        """Ends the call with an error."""
        if self.ending is None:
            self.ending = error
            self._task.cancel()

    def close(self) -> None:
        """Gives back what the call holds."""
        self.set_busy()
        self.count(-self._held_bytes)

    def fail(self, error: LayertapError) -> LayertapError:
        """Records the error that the call ends with; returns it with the call's request_id."""
        self.record.fail(error)
        error.request_id = self.record.request_id
        return error
