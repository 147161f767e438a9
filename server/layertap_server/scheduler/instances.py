"""The instances of one batcher: how many live, which ones hang, and how they end.

A lost instance fails the calls of its batch and no others; see `worker`. When the last one is lost, all calls that wait
fail.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence

from layertap_server.scheduler.call import BatchPart, Hooks
from layertap_server.scheduler.worker import Worker
from layertap_server.types import Encode

log = logging.getLogger(__name__)


class Instances:
    """The instances, each a thread.

    Attributes:
        count: How many there were at the start.
        live_count: How many are not lost.
        workers: Their threads.
    """

    def __init__(
        self,
        encodes: Sequence[Encode],
        *,
        next_batch: Callable[[int], list[BatchPart] | None],
        short_batch: Callable[[int, Sequence[BatchPart]], list[BatchPart]],
        on_all_lost: Callable[[], None],
        hooks: Hooks,
    ) -> None:
        """Starts one instance for each `encode`.

        Args:
            encodes: What runs a batch; each is called by one instance only.
            next_batch: Waits for a batch for an instance, by its index. None: none will come.
            short_batch: Returns what an instance may run while the given batch pauses; empty: nothing.
            on_all_lost: Called when the last instance is lost, in the thread that finds out.
            hooks: Called for each batch that has run.
        """
        self.count = self.live_count = len(encodes)
        self._on_all_lost = on_all_lost
        self._lock = threading.Lock()
        self.workers = [
            Worker(
                f"instance-{n}",
                encode,
                next_batch=functools.partial(next_batch, n),
                short_batch=functools.partial(short_batch, n),
                on_lost=self._lost,
                hooks=hooks,
            )
            for n, encode in enumerate(encodes)
        ]

    def lose_stuck(self, timeout_s: float) -> None:
        """Gives up every instance that has made no progress with its batch for so long, in seconds."""
        for worker in self.workers:
            if worker.lose(stuck_s=timeout_s):
                log.error("%s has made no progress for %.0f s and is given up", worker.name, timeout_s)

    def ended(self, timeout_s: float) -> bool:
        """Waits until all have ended, but not longer; returns whether they have. Lost ones are not waited for."""
        deadline = time.monotonic() + timeout_s
        waits = [0.0 if worker.lost else deadline for worker in self.workers]
        ends = [
            worker.ended(max(wait - time.monotonic(), 0.0)) for worker, wait in zip(self.workers, waits, strict=True)
        ]
        return all(ends)

    def _lost(self) -> None:
        with self._lock:
            self.live_count -= 1
            left = self.live_count
        log.error("an instance is lost, %d of %d are left", left, self.count)
        if not left:
            self._on_all_lost()
