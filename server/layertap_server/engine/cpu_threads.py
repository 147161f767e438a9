"""Which engine threads there are, and how many CPU threads each of them computes with.

On cuda one instance for each device. On the CPU several instances with one thread each, which share the weights: that
is faster than one instance with several threads. A small batch of one caller that comes while nobody else computes gets
all cores, if it falls to the first instance, which the batcher wakes first. Only one instance may have a team: OpenMP's
threads wait for each other awake, which a short text needs, only as long as the process has no more of them than cores.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Final

from layertap_server.engine.encoder import Encoder
from layertap_server.types import Encode, Rows, Run

log = logging.getLogger(__name__)

_MAX_CPU_INSTANCES: Final = 4
_LONE_TOKENS: Final = 256
"""Up to here a caller who is alone gets all cores; of more, other instances take their share."""


def make(encoders: Sequence[Encoder], *, instance_count: int, thread_count: int) -> list[Encode]:
    """Returns what each instance runs.

    Args:
        encoders: One for each device.
        instance_count: Instances on the CPU; 0 chooses by the cores there are.
        thread_count: Threads of each instance on the CPU; 0 shares the cores out.
    """
    if encoders[0].device.type != "cpu":
        return [encoder.encode for encoder in encoders]
    (encoder,) = encoders
    cores = len(os.sched_getaffinity(0))
    instance_count = instance_count or min(cores, _MAX_CPU_INSTANCES)
    thread_count = thread_count or max(1, cores // instance_count)
    log.info("%d instances with %d threads each", instance_count, thread_count)
    crew = _Crew(encoder, thread_count=thread_count, lone_thread_count=cores if thread_count == 1 else thread_count)
    return [functools.partial(crew.encode, instance) for instance in range(instance_count)]


class _Crew:
    """The instances of a CPU, which know of each other whether they work."""

    def __init__(self, encoder: Encoder, *, thread_count: int, lone_thread_count: int) -> None:
        self._encoder = encoder
        self._thread_count = thread_count
        self._lone_thread_count = lone_thread_count
        self._busy: set[int] = set()  # Each instance changes its own entry alone, so no two can disagree on a count.

    def encode(self, instance: int, batch: Sequence[Run]) -> Iterator[Rows]:
        token_count = sum(text.token_count for text in batch[0].texts)
        lone = instance == 0 and not self._busy and len(batch) == 1 and token_count <= _LONE_TOKENS
        self._busy.add(instance)
        try:
            self._encoder.use_threads(self._lone_thread_count if lone else self._thread_count)
            yield from self._encoder.encode(batch)
        finally:
            self._busy.discard(instance)
