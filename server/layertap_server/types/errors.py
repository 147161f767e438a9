"""The device errors that the scheduler tells apart, and the seconds after which a refused caller may try again."""

from __future__ import annotations

from typing import Final

RETRY_FULL_S: Final = 0.5
"""For a full server."""
RETRY_STOPPING_S: Final = 1.0
"""For a server that is stopping or has lost its engine."""
RETRY_ELSEWHERE_S: Final = 0.0
"""Where another server can continue at once."""


class OutOfMemoryError(Exception):
    """The device has no memory for this batch. A smaller one may fit."""


class DeviceLostError(Exception):
    """The device no longer computes anything."""
