"""How long `wait_until_ready` waits, and between which attempts."""

from __future__ import annotations

import time
from typing import Final

from layertap.errors import DeadlineExceededError, LayertapError, ResourceExhaustedError, UnavailableError

PASSING: Final = (UnavailableError, DeadlineExceededError, ResourceExhaustedError)
"""Errors of a server that may yet become ready."""

_PAUSE_S: Final = 0.2


class Readiness:
    """The attempts of one `wait_until_ready`."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._ends_at = time.monotonic() + timeout_s

    @property
    def left_s(self) -> float:
        """How many seconds the next attempt may take."""
        return max(self._ends_at - time.monotonic(), _PAUSE_S)

    def pause_s(self, error: LayertapError) -> float:
        """Returns how long to wait after a failed attempt, in seconds.

        Raises:
            DeadlineExceededError: if there is no time for another attempt.
        """
        pause_s = error.retry_after_s or _PAUSE_S
        if time.monotonic() + pause_s >= self._ends_at:
            raise DeadlineExceededError(f"not ready within {self._timeout_s} s: {error.details}") from error
        return pause_s
