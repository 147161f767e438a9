"""How many tokens a batch may have while several callers share the server.

A call that comes while all instances compute waits for one of them, and then for its own batch. So while callers
alternate, a batch has at most the tokens that lately took 50 ms: another caller then waits for about twice as long,
however much one of them has queued. On the CPU that costs about 3 % of the speed in bulk, so a caller that is alone has
the whole `--max-batch-tokens`. A text is never cut: the time of the longest one is the least that others may wait.

Pure; the batcher calls it under its lock.
"""

from __future__ import annotations

from typing import Final

TARGET_S: Final = 0.05
"""What a batch should take while callers share the server."""
_SHARED_S: Final = 10.0
"""For so long after callers have alternated, the server counts as shared."""
_LEAST_TOKENS: Final = 64
"""A batch may always have so many: with less, most of the time is not spent on tokens."""
_MEMORY: Final = 0.9
"""How much of what is known of earlier batches counts beside the last one."""


class BatchTime:
    """What is known of how long batches take, and of who has come lately."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0
        self._last: tuple[str, str] | None = None
        self._shared_until = 0.0

    def arrived(self, client: str, connection: str, now: float) -> None:
        """Notes that a caller has queued texts.

        Args:
            client: Its client.
            connection: Its connection among those of the client.
            now: The time, in seconds.
        """
        if self._last != (client, connection):
            if self._last is not None:
                self._shared_until = now + _SHARED_S
            self._last = client, connection

    def ran(self, token_count: int, seconds: float) -> None:
        """Notes how long a batch took."""
        self._tokens = _MEMORY * self._tokens + token_count
        self._seconds = _MEMORY * self._seconds + seconds

    def most_tokens(self, most: int, now: float) -> int:
        """Returns how many tokens the next batch may have, at most so many."""
        if now >= self._shared_until or not self._seconds:
            return most
        return min(most, max(_LEAST_TOKENS, int(TARGET_S * self._tokens / self._seconds)))
