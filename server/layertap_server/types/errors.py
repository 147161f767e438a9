"""Errors that several packages name: those of devices, those of numbers, and when a refused caller may try again."""

from __future__ import annotations

from typing import Final

from layertap.errors import InternalError, LayertapError, OutOfRangeError

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


class EngineLostError(Exception):
    """The engine has failed for good; threads of its may never end."""


NARROW_LIMITS: Final = {"float32": float("inf"), "float16": 65520.0, "bfloat16": 3.3953138e38}
"""From here on a float32 becomes infinite when it is narrowed."""


def unsendable(*, finite: bool, layer: int, dtype: str) -> LayertapError:
    """Returns why numbers of a layer cannot be sent in a dtype."""
    if finite:
        return OutOfRangeError(f"a value of layer {layer} does not fit {dtype}; ask for dtype float32")
    return InternalError(f"layer {layer} came out as NaN or infinity; the model's weights are at fault, not the text")
