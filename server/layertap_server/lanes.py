"""Which engine threads there are, and how many CPU threads each of them computes with.

On cuda one lane for each device. On the CPU several lanes with one thread each, which share the weights: that is faster
than one lane with several threads. A lone text does not get more threads than its lane has: OpenMP lets threads sleep
between steps as soon as the process has more of them than cores, and waking them costs more than they bring.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Final

from layertap_server.encoder import Encoder
from layertap_server.work import Encode, Rows, Run

log = logging.getLogger(__name__)

_MAX_CPU_LANES: Final = 4


def make(encoders: Sequence[Encoder], *, lane_count: int, thread_count: int) -> list[Encode]:
    """Returns what each lane runs.

    Args:
        encoders: One for each device.
        lane_count: Lanes on the CPU; 0 chooses by the cores there are.
        thread_count: Threads of each lane on the CPU; 0 shares the cores out.
    """
    if encoders[0].device.type != "cpu":
        return [encoder.encode for encoder in encoders]
    (encoder,) = encoders
    cores = len(os.sched_getaffinity(0))
    lane_count = lane_count or min(cores, _MAX_CPU_LANES)
    thread_count = thread_count or max(1, cores // lane_count)
    log.info("%d lanes with %d threads each", lane_count, thread_count)

    def encode(batch: Sequence[Run]) -> Iterator[Rows]:
        encoder.use_threads(thread_count)
        return encoder.encode(batch)

    return [encode] * lane_count
