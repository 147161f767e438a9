"""Which lanes sleep, and how as many of them are woken as there is work for.

A lane that is woken for nothing takes the interpreter from those who have work, so lanes are not all called for every
text. The first ones are called first: a server with little to do keeps to one lane, whose caches are warm.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Bells:
    """One bell for each lane. All of it is used with the one lock held that it was made with."""

    def __init__(self, lock: threading.Lock, lane_count: int) -> None:
        """Takes the lock that lanes let go of while they sleep."""
        self._bells = [threading.Condition(lock) for _ in range(lane_count)]
        self._asleep: set[int] = set()
        self._looking = 0

    @property
    def idle_count(self) -> int:
        """How many lanes have no batch: those asleep, and those that look for one."""
        return len(self._asleep) + self._looking

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Counts a lane among those that look for a batch."""
        self._looking += 1
        try:
            yield
        finally:
            self._looking -= 1

    def sleep(self, lane: int) -> None:
        """Waits, in the thread of a lane that looks for a batch, until it is woken."""
        self._looking -= 1
        self._asleep.add(lane)
        self._bells[lane].wait()
        self._rise(lane)

    def wake(self, wanted: int) -> None:
        """Wakes lanes until so many look for a batch, or none sleeps."""
        for lane in sorted(self._asleep)[: max(wanted - self._looking, 0)]:
            self._rise(lane)
            self._bells[lane].notify()

    def _rise(self, lane: int) -> None:
        if lane in self._asleep:
            self._asleep.remove(lane)
            self._looking += 1
