"""How many messages of one client come in at once.

gRPC copies a whole message on the event loop when its last byte has come, some milliseconds for 8 MB, and all that end
at once before it looks at anything else. So only some messages of a client come in at once; the others stay with the
caller. What has not come whole after a while holds up no other: it may never come, or a stream may be idle.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Final

MAX_COUNT: Final = 4
"""Messages of one client at once. The largest ones take 20 ms of the event loop; short ones come in its next step."""
_FRESH_S: Final = 0.1
"""For so long a message counts that has not come whole."""


class Reads:
    """The messages that are coming in."""

    def __init__(self) -> None:
        self._started: dict[str, dict[object, float]] = {}
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    async def begin(self, client: str, caller: object) -> None:
        """Waits until a caller may read its next message; `end` must follow.

        Args:
            client: Its client.
            caller: What tells it apart; it reads one message at a time.
        """
        own = self._started.setdefault(client, {})
        while len(own) >= MAX_COUNT:
            oldest, started_at = next(iter(own.items()))
            if started_at + _FRESH_S <= time.monotonic():
                del own[oldest]
            else:
                await self._wait(client, started_at + _FRESH_S)
                own = self._started.setdefault(client, {})
        own[caller] = time.monotonic()

    def end(self, client: str, caller: object) -> None:
        """Notes that a message has come, or will not."""
        own = self._started.get(client, {})
        own.pop(caller, None)
        if not own:
            self._started.pop(client, None)
        for future in self._waiting.get(client, ()):
            if not future.done():
                future.set_result(None)
                break

    async def _wait(self, client: str, until: float) -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        waiting = self._waiting.setdefault(client, deque())
        waiting.append(future)
        try:
            async with asyncio.timeout(max(until - time.monotonic(), 0.0)):
                await future
        except TimeoutError:
            pass
        finally:
            waiting.remove(future)
            if not waiting:
                self._waiting.pop(client, None)
