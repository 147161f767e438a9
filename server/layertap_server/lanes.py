"""Which engine threads there are, and how many CPU threads each of them computes with.

On cuda one lane for each device. On the CPU several lanes with one thread each, which share the weights: that is faster
than one lane with several threads. A lone text does not get more threads than its lane has: OpenMP lets threads sleep
between steps as soon as the process has more of them than cores, and waking them costs more than they bring.
"""

from __future__ import annotations

import functools
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

    import sys

    sys.setswitchinterval(float(os.environ.get("SWI", "0.005")))
    cores_and_lanes = _Shares(encoder, lane_threads=thread_count, all_threads=cores)
    return [functools.partial(cores_and_lanes.encode, lane) for lane in range(lane_count)]


class _Shares:
    def __init__(self, encoder: Encoder, *, lane_threads: int, all_threads: int) -> None:
        self._encoder, self._lane_threads, self._all_threads = encoder, lane_threads, all_threads
        self._busy_count = 0

    def encode(self, lane: int, batch: Sequence[Run]) -> Iterator[Rows]:
        alone = lane == 0 and not self._busy_count
        self._busy_count += 1
        try:
            self._encoder.use_threads(self._all_threads if alone else self._lane_threads)
            yield from self._encoder.encode(batch)
        finally:
            self._busy_count -= 1
