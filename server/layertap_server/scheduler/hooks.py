"""Who is told, beside the callers, what becomes of batches and of those who are turned away.

Pure. The queue, the instances and the doors know an `Observer` and nothing of what it does with what it is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from layertap_server.scheduler.call import Taken


class Observer(Protocol):
    """Is told of what no single call knows. May be called from any thread; must be quick."""

    def ran(self, batch: Sequence[Taken], *, started_at_ns: int, compute_time_ns: int) -> None:
        """Is told of a batch that an instance has run.

        Args:
            batch: What was in it.
            started_at_ns: When the instance began, by time.monotonic_ns.
            compute_time_ns: How long it took.
        """

    def refused(self, reason: str) -> None:
        """Is told that a call was turned away, and in one word by what: see `REASONS`."""


REASONS = ("calls", "request_bytes", "queue_texts", "queue_tokens", "stopping", "no_instances", "unauthenticated")
"""What calls are turned away by."""


class Nobody:
    """An observer that does not care."""

    def ran(self, batch: Sequence[Taken], *, started_at_ns: int, compute_time_ns: int) -> None:
        """Does nothing."""

    def refused(self, reason: str) -> None:
        """Does nothing."""
