"""How many instances compute, and on the CPU with how many threads each.

On cuda there are two instances for each device: while the numbers of one batch are brought to the host and handed over,
the device computes the other's. On the CPU several instances with one thread each share the weights:
that is faster than one instance with several threads. A small batch of one caller that comes while all instances are
idle gets all cores, if it falls to the first instance, which the batcher wakes first. Only one instance may have a team
of threads: the threads of OpenMP wait for each other awake, which pays only while the process has no more of them than
cores, and while these are free; see `thread_team`. A team is only as large as gives the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Final

from layertap.errors import counted
from layertap_server.cores import core_count
from layertap_server.engine.encoder import Encoder
from layertap_server.engine.oom_retry import with_oom_retry
from layertap_server.engine.thread_team import ThreadTeam
from layertap_server.types import Encode, Rows, Run

log = logging.getLogger(__name__)

_MAX_CPU_INSTANCES: Final = 4
_INSTANCES_PER_DEVICE: Final = 2
_LONE_TOKENS: Final = 256
"""Up to so many tokens a lone caller gets all cores; of more, other instances take their share."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CpuThreads:
    """How the cores are shared.

    Attributes:
        instance_count: Instances.
        thread_count: Threads of each instance.
        lone_thread_count: Threads of a lone caller's small batch, if they give the same bits.
    """

    instance_count: int
    thread_count: int
    lone_thread_count: int


def share(*, instance_count: int = 0, thread_count: int = 0, process_count: int = 1) -> CpuThreads:
    """Returns how the cores of one process are shared.

    Args:
        instance_count: Instances on the CPU; 0 chooses by the number of cores.
        thread_count: Threads of each instance; 0 shares the cores between the instances.
        process_count: Processes that share the cores of the machine.
    """
    cores = max(1, core_count() // process_count)
    instance_count = instance_count or min(cores, _MAX_CPU_INSTANCES)
    thread_count = thread_count or max(1, cores // instance_count)
    return CpuThreads(
        instance_count=instance_count,
        thread_count=thread_count,
        lone_thread_count=cores if thread_count == 1 else thread_count,
    )


def make(encoders: Sequence[Encoder], threads: CpuThreads) -> list[Encode]:
    """Returns what each instance runs, by encoders of one for each device; what finds no memory runs in halves."""
    if encoders[0].device.type != "cpu":
        return [with_oom_retry(one.encode_beside()) for one in encoders for _ in range(_INSTANCES_PER_DEVICE)]
    (encoder,) = encoders
    each = counted(encoder.thread_count, "thread")
    log.info("%s with %s each", counted(threads.instance_count, "instance"), each)
    instances = _CpuInstances(encoder)
    return [with_oom_retry(functools.partial(instances.encode, n)) for n in range(threads.instance_count)]


class _CpuInstances:
    """The instances of a CPU, which know of each other whether they work."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        # The threads of each instance that works. It changes its own entry alone, so no two can disagree on a count.
        self._busy: dict[int, int] = {}
        self._team = ThreadTeam()

    def encode(self, instance: int, batch: Sequence[Run]) -> Iterator[Rows | None]:
        token_count = sum(text.token_count for text in batch[0].texts)
        lone = instance == 0 and not self._busy and len(batch) == 1 and token_count <= _LONE_TOKENS
        paused = self._busy.get(instance)  # The threads of the batch that pauses meanwhile, if one does.
        started_at, computed_s = time.perf_counter(), time.thread_time()
        try:
            has_team = lone and self._team.pays
            self._use_threads(instance, self._encoder.max_thread_count if has_team else self._encoder.thread_count)
            yield from self._encoder.encode_with_pauses(batch)
        finally:
            if paused is None:
                self._busy.pop(instance, None)
            else:
                self._use_threads(instance, paused)
            if lone:
                self._team.note(wall_s=time.perf_counter() - started_at, cpu_s=time.thread_time() - computed_s)

    def _use_threads(self, instance: int, count: int) -> None:
        self._busy[instance] = count
        self._encoder.use_threads(count)
