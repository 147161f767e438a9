"""A limit that clients share: queued texts, queued tokens, or bytes of outputs.

Pure; the batcher changes it, under its lock.
"""

from __future__ import annotations

from collections import Counter


class Budget:
    """How much of one limit is used, and by which client.

    The last quarter is kept for clients that use less than a quarter, so that one client cannot use all of it. A client
    that uses nothing may ask for the whole limit: any request that is within the limits can be admitted.

    Attributes:
        limit: The limit.
        used: What all clients use.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._used_by: Counter[str] = Counter()

    def used_by(self, client: str) -> int:
        """Returns what one client uses."""
        return self._used_by[client]

    def has_room(self, client: str, amount: int) -> bool:
        """Returns whether a client may use so much more."""
        own, quarter = self._used_by[client], self.limit // 4
        is_light = not own or own + amount <= quarter
        return self.used + amount <= (self.limit if is_light else self.limit - quarter)

    def add(self, client: str, amount: int) -> None:
        """Counts what a client uses, or with a negative amount gives back."""
        self.used += amount
        self._used_by[client] += amount
        if not self._used_by[client]:
            del self._used_by[client]
