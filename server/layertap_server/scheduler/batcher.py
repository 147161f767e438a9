"""The queue and its instances: texts of many calls in, batches through the instances, events back to the calls.

Knows neither torch nor gRPC nor protobuf: `encode` is an argument, events leave through each call's `deliver`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from layertap_server.scheduler.call import Call, Hooks
from layertap_server.scheduler.call_queue import CallQueue
from layertap_server.scheduler.instances import Instances
from layertap_server.scheduler.queue_limits import QueueLimits
from layertap_server.types import ApplyModules, Encode


class Batcher:
    """The queue and its instances.

    Attributes:
        instance_count: How many instances there were at the start.
        queue: The calls that wait.
        open: Makes a call; see `Call`. Whether there is room for it is found as its texts are added.
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
        self.instance_count = len(encodes)
        self.queue = CallQueue(len(encodes), limits, hooks, apply_modules)
        self.open = functools.partial(Call, self.queue)
        self._instances = Instances(
            encodes,
            next_batch=self.queue.next_batch,
            short_batch=self.queue.short_batch,
            on_all_lost=self._fail_lost,
            hooks=hooks,
        )

    @property
    def live_instance_count(self) -> int:
        """How many instances are not lost."""
        return self._instances.live_count

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
        """See `Instances.lose_stuck`."""
        self._instances.lose_stuck(timeout_s)

    def stop(self, timeout_s: float) -> bool:
        """Fails waiting calls with UNAVAILABLE and ends the instances after their batches.

        Args:
            timeout_s: How long to wait for them.

        Returns:
            Whether all of them have ended.
        """
        self.queue.end("the server is stopping; try another, or again later", reason="stopping")
        return self._instances.ended(timeout_s)

    def _fail_lost(self) -> None:
        message = "the engine has failed and the server is stopping; try another, or again later"
        self.queue.end(message, reason="no_instances")
