"""The queue and its instances: texts of many calls in, batches through the instances, events back to the calls.

A lost instance fails the calls of its batch and no others; see `worker`. When the last one is lost, all calls that wait
fail. Knows neither torch nor gRPC nor protobuf: `encode` is an argument, events leave through each call's `deliver`.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Sequence

from layertap_server.scheduler.call import Call, Hooks, LoopWaker
from layertap_server.scheduler.call_queue import CallQueue
from layertap_server.scheduler.queue_limits import QueueLimits
from layertap_server.scheduler.worker import Worker
from layertap_server.types import ApplyModules, Encode

log = logging.getLogger(__name__)


class Batcher:
    """The queue and its instances.

    Attributes:
        instance_count: How many instances there were at the start.
        live_instance_count: How many are not lost.
        workers: The instances, each a thread.
        queue: The calls that wait.
        open: Makes a call; see `Call`. Whether there is room for it is found as its texts are added.
        waker: Wakes the event loop that reads what is delivered, where one does.
    """

    def __init__(
        self,
        encodes: Sequence[Encode],
        limits: QueueLimits,
        *,
        apply_modules: ApplyModules = lambda pooled: pooled,
        hooks: Hooks | None = None,
    ) -> None:
        """Starts one instance, a thread, for each `encode`.

        Args:
            encodes: What runs a batch; each is called by one instance only.
            limits: The limits of the queue.
            apply_modules: Applies the sentence modules of vectors, in any instance.
            hooks: Called for batches and refusals.
        """
        hooks = hooks or Hooks()
        self.instance_count = self.live_instance_count = len(encodes)
        self.queue = CallQueue(len(encodes), limits, hooks, apply_modules)
        self.open = functools.partial(Call, self.queue)
        self.waker = LoopWaker()
        self._lock = threading.Lock()  # Of the count of live instances, which threads of lost ones lower.
        self.workers = [
            Worker(
                f"instance-{n}",
                encode,
                next_batch=functools.partial(self.queue.next_batch, n),
                short_batch=functools.partial(self.queue.short_batch, n),
                on_lost=self._lost,
                hooks=hooks,
            )
            for n, encode in enumerate(encodes)
        ]

    @property
    def idle_instance_count(self) -> int:
        """How many instances have no batch."""
        return self.queue.idle.count

    @property
    def waiting_text_count(self) -> int:
        """Texts in the queue."""
        return self.queue.waiting.texts.used

    @property
    def waiting_token_count(self) -> int:
        """Their tokens."""
        return self.queue.waiting.tokens.used

    @property
    def held_bytes(self) -> int:
        """Output bytes that are reserved."""
        return self.queue.output_bytes.used

    def lose_stuck(self, timeout_s: float) -> None:
        """Gives up every instance that has made no progress with its batch for so long, in seconds."""
        for worker in self.workers:
            if worker.lose(stuck_s=timeout_s):
                log.error("%s has made no progress for %.0f s and is given up", worker.name, timeout_s)

    def stop(self, timeout_s: float) -> bool:
        """Fails waiting calls with UNAVAILABLE and ends the instances after their batches.

        Args:
            timeout_s: How long to wait for them; lost ones are not waited for.

        Returns:
            Whether all of them have ended.
        """
        self.queue.end("the server is stopping; try another, or again later", reason="stopping")
        deadline = time.monotonic() + timeout_s
        return all([one.ended(0.0 if one.lost else max(deadline - time.monotonic(), 0.0)) for one in self.workers])

    def _lost(self) -> None:
        with self._lock:
            self.live_instance_count -= 1
            left = self.live_instance_count
        log.error("an instance is lost, %d of %d are left", left, self.instance_count)
        if not left:
            message = "the engine has failed and the server is stopping; try another, or again later"
            self.queue.end(message, reason="no_instances")
