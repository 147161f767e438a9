"""Which of several ways to compute the same thing is used: what a trial on this very device finds right and fast.

A way that was written for other hardware, or that comes from a young part of torch, can be missing, wrong or slow here.
It is compared with the plain way at start, once; the log says what was found. So a fast path can be left out, but a
wrong one cannot be used. One that breaks the device ends the process: cuda has no way back from that.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

import torch

from layertap_server.engine.runtime import Runtime
from layertap_server.model.files import reason_of
from layertap_server.types import DeviceLostError

log = logging.getLogger(__name__)

Way = TypeVar("Way")

_CLEARLY_FASTER: Final = 1.03
"""Ratios near 1 would fall differently at each start of a server, and two ways give different bits."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trial(Generic[Way]):
    """What a trial found of a fast way.

    Attributes:
        better: The fast way if it is right and clearly faster, else the plain one.
        is_right: Whether the fast way is there, and its numbers agree.
        is_faster: Whether it is also clearly faster.
    """

    better: Way
    is_right: bool
    is_faster: bool


def tried(
    what: str,
    plain: Way,
    fast: Callable[[], Way],
    run: Callable[[Way], Sequence[torch.Tensor]],
    *,
    runtime: Runtime,
    tolerance: float,
) -> Trial[Way]:
    """Compares two ways.

    Args:
        what: The name of the fast one in the log.
        plain: The way that is known to be right.
        fast: Makes the other one.
        run: Runs a way; both get the same input, and what they return is compared.
        runtime: The device, and its clock.
        tolerance: The largest difference between results that agree, as a part of the largest value.

    Raises:
        DeviceLostError: if the device does not work any more after it.
    """
    try:
        way = fast()
        pairs = zip(run(plain), run(way), strict=True)
        differences = [runtime.difference(found, wanted) for wanted, found in pairs]
        if not all(difference <= tolerance for difference in differences):  # NaN is not agreement either.
            log.warning("%s: not used, its numbers differ by %s (at most %.1e)", what, differences, tolerance)
            return Trial(better=plain, is_right=False, is_faster=False)
        ratio = runtime.seconds(lambda: run(plain)) / runtime.seconds(lambda: run(way))
    except Exception as exc:  # It may be missing, or refuse this device, shape or dtype in any way.
        if not runtime.works():
            raise DeviceLostError(f"{runtime.device} does not work since a trial ({what}: {reason_of(exc)})") from exc
        log.info("%s: not available here (%s: %s)", what, type(exc).__name__, exc)
        log.debug("%s", what, exc_info=True)
        return Trial(better=plain, is_right=False, is_faster=False)
    is_faster = ratio >= _CLEARLY_FASTER
    log.info(
        "%s: %s (%.2f times as fast, largest difference %.1e)",
        what,
        "used" if is_faster else "not used",
        ratio,
        max(differences),
    )
    return Trial(better=way if is_faster else plain, is_right=True, is_faster=is_faster)
