"""Which engine threads there are, and how many CPU threads each of them computes with.

On cuda one lane for each device. On the CPU several lanes with one thread each are faster than one lane with several,
as long as there is work for all of them; a batch that starts while every other lane idles gets all threads, so that a
lone short text is answered sooner. Lanes on the CPU share the weights.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from layertap_server.encoder import Encoder
from layertap_server.work import Rows, Run

log = logging.getLogger(__name__)

Encode = Callable[[Sequence[Run]], Iterator[Rows]]

_MAX_CPU_LANES: Final = 4
_ALONE_TOKENS: Final = 256
"""Up to here a lone batch gets all threads; a longer one would hold up the lane that wakes meanwhile."""


def make(encoders: Sequence[Encoder], *, lane_count: int, thread_count: int) -> list[Encode]:
    """Returns what each lane runs.

    Args:
        encoders: One for each device.
        lane_count: Lanes on the CPU; 0 chooses by the cores there are.
        thread_count: Threads of each lane on the CPU; 0 shares the cores out and lets a lone batch have them all.
    """
    if encoders[0].device.type != "cpu":
        return [encoder.encode for encoder in encoders]
    cores = len(os.sched_getaffinity(0))
    lane_count = lane_count or min(cores, _MAX_CPU_LANES)
    shared = thread_count or max(1, cores // lane_count)
    log.info("%d lanes with %d threads each", lane_count, shared)
    return [_CpuLanes(encoders[0], shared=shared, alone=thread_count or cores).encode] * lane_count


class _CpuLanes:
    """Shares the cores out among the lanes that are busy."""

    def __init__(self, encoder: Encoder, *, shared: int, alone: int) -> None:
        self._encoder, self._shared, self._alone = encoder, shared, alone
        self._lock = threading.Lock()
        self._busy_count = 0

    def encode(self, batch: Sequence[Run]) -> Iterator[Rows]:
        token_count = sum(text.token_count for run in batch for text in run.texts)
        with self._lock:
            self._busy_count += 1
            alone = self._busy_count == 1 and token_count <= _ALONE_TOKENS
        try:
            self._encoder.use_threads(self._alone if alone else self._shared)
            yield from self._encoder.encode(batch)
        finally:
            with self._lock:
                self._busy_count -= 1
