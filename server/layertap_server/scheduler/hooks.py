"""What the server calls when a batch has run or a call is refused.

The queue, the instances and the admission of calls know `Hooks` and nothing of what is behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from layertap_server.scheduler.call import BatchPart

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


class Hooks(Protocol):
    """Called from any thread; must be quick."""

    def ran(self, batch: Sequence[BatchPart], *, started_at_ns: int, compute_time_ns: int) -> None:
        """An instance has run a batch.

        Args:
            batch: Its parts.
            started_at_ns: When the instance began, by time.monotonic_ns.
            compute_time_ns: How long it took.
        """

    def refused(self, reason: str) -> None:
        """A call was refused; the reason is one of `REASONS`."""


class NoHooks:
    """Hooks that do nothing."""

    def ran(self, batch: Sequence[BatchPart], *, started_at_ns: int, compute_time_ns: int) -> None:
        """Does nothing."""

    def refused(self, reason: str) -> None:
        """Does nothing."""
