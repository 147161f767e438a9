"""Which instances sleep, and how as many of them are woken as there is work for.

An instance that is woken for nothing takes the interpreter from those who have work, so instances are not all called
for every text. The first ones are called first: a server with little to do keeps to one instance, whose caches are
warm.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Bells:
    """One bell for each instance. All of it is used with the one lock held that it was made with."""

    def __init__(self, lock: threading.Lock, instance_count: int) -> None:
        """Takes the lock that instances let go of while they sleep."""
        self._bells = [threading.Condition(lock) for _ in range(instance_count)]
        self._asleep: set[int] = set()
        self._looking = 0

    @property
    def idle_count(self) -> int:
        """How many instances have no batch: those asleep, and those that look for one."""
        return len(self._asleep) + self._looking

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Counts an instance among those that look for a batch."""
        self._looking += 1
        try:
            yield
        finally:
            self._looking -= 1

    def sleep(self, instance: int) -> None:
        """Waits, in the thread of an instance that looks for a batch, until it is woken."""
        self._looking -= 1
        self._asleep.add(instance)
        self._bells[instance].wait()
        self._rise(instance)

    def wake(self, wanted: int) -> None:
        """Wakes instances until so many look for a batch, or none sleeps."""
        for instance in sorted(self._asleep)[: max(wanted - self._looking, 0)]:
            self._rise(instance)
            self._bells[instance].notify()

    def _rise(self, instance: int) -> None:
        if instance in self._asleep:
            self._asleep.remove(instance)
            self._looking += 1
