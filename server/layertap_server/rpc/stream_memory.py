"""The memory for what streams have read and not yet answered, as much as that for all other requests.

What a stream reads counts when it has come, so that streams may take more than the limit by a message each. Others must
not be refused for that: streams have a limit of their own, and wait.
"""

from __future__ import annotations

import asyncio

from layertap_server.scheduler.fairness import Budget


class StreamMemory:
    """What the streams of each client hold; see `Budget` for what is kept for light clients."""

    def __init__(self, limit: int) -> None:
        self._budget = Budget(limit)
        self._freed = asyncio.Event()

    def add(self, client: str, byte_count: int) -> None:
        """Counts bytes, or with a negative number gives them back."""
        self._budget.add(client, byte_count)
        if byte_count < 0:
            self._freed.set()

    def has_room(self, client: str) -> bool:
        """Returns whether streams of a client may hold more; one that holds nothing always may."""
        return self._budget.has_room(client, 1) or not self._budget.used_by(client)

    async def room(self, client: str) -> None:
        """Waits until streams of a client may hold more."""
        while not self.has_room(client):
            self._freed.clear()
            await self._freed.wait()
