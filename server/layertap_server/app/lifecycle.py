"""How a server ends.

In this order: health says NOT_SERVING and new calls are refused; calls under way have a grace to finish, an EmbedStream
answers what it has read; calls that are left fail with UNAVAILABLE; watchers of health are sent their last status;
connections close; the engine ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from layertap.errors import counted
from layertap_server import signals
from layertap_server.rpc.admission import Admission
from layertap_server.scheduler.batcher import Batcher

log = logging.getLogger(__name__)

_LAST_STATUS_S: Final = 2.0
"""How long sending the last statuses may take, and how long instances may take to end their batches."""
_WATCH_S: Final = 1.0
"""How often the instances are checked."""


def stop_signal(*, once: bool = True) -> asyncio.Future[None]:
    """Returns a future that is done at the first signal that stops the server.

    Signals are caught from the call on. With `once` the next one ends the process at once; else it has no effect.
    """
    loop = asyncio.get_running_loop()
    received = loop.create_future()

    def stop() -> None:
        if once:
            for number in numbers:
                loop.remove_signal_handler(number)
            signals.install()
        if not received.done():
            received.set_result(None)

    numbers = signals.stopping()
    for number in numbers:
        loop.add_signal_handler(number, stop)
    return received


async def until_lost(batcher: Batcher, *, timeout_s: float) -> None:
    """Gives up instances that make no progress with a batch for so long; returns when no instance is left."""
    looked_at = runs_since = time.monotonic()
    while batcher.live_instance_count:
        await asyncio.sleep(min(_WATCH_S, timeout_s / 4))
        now = time.monotonic()
        if now - looked_at > timeout_s / 2 + _WATCH_S:
            runs_since = now  # The process was stopped, as a paused container is, and its instances with it.
        looked_at = now
        if now - runs_since >= timeout_s:
            batcher.lose_stuck(timeout_s)


async def drain(
    admission: Admission,
    batcher: Batcher,
    *,
    stops: Sequence[Callable[[float | None], Awaitable[None]]],
    end_watches: Callable[[float], Awaitable[None]],
    grace_s: float,
) -> None:
    """Ends a server whose health is already NOT_SERVING.

    Args:
        admission: Its calls.
        batcher: Its queue.
        stops: For each listener what refuses new calls at once and closes the connections after so many seconds;
            None: at once.
        end_watches: Ends the watches of health after their last status, within so many seconds.
        grace_s: How long calls under way may take, in seconds.
    """

    async def stop(grace_s: float | None) -> None:
        await asyncio.gather(*(one(grace_s) for one in stops))

    admission.close()
    stopping = asyncio.ensure_future(stop(grace_s + 2 * _LAST_STATUS_S))
    if not await admission.emptied(grace_s):
        log.warning("%s did not finish within %.0f s", counted(admission.call_count, "call"), grace_s)
        admission.cut()
        await admission.emptied(_LAST_STATUS_S)
    # Only now, so that no connection closes under a watcher that has not been sent its last status.
    await end_watches(_LAST_STATUS_S)
    await stop(None)
    await stopping
    await asyncio.to_thread(batcher.stop, _LAST_STATUS_S)
