"""Limits that clients share: queued texts, queued tokens, or bytes of outputs.

Pure; the batcher changes it, under its lock.
"""

from __future__ import annotations

from layertap.errors import ResourceExhaustedError
from layertap_server.scheduler.hooks import Hooks
from layertap_server.types import RETRY_FULL_S


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
        self._used_by: dict[str, int] = {}

    def used_by(self, client: str) -> int:
        """Returns what one client uses."""
        return self._used_by.get(client, 0)

    def has_room(self, client: str, amount: int) -> bool:
        """Returns whether a client may use so much more."""
        own, quarter = self._used_by.get(client, 0), self.limit // 4
        is_light = not own or own + amount <= quarter
        return self.used + amount <= (self.limit if is_light else self.limit - quarter)

    def add(self, client: str, amount: int) -> None:
        """Counts what a client uses, or with a negative amount gives back."""
        self.used += amount
        if own := self._used_by.get(client, 0) + amount:
            self._used_by[client] = own
        else:
            self._used_by.pop(client, None)


class QueueBudget:
    """The texts that wait in the queue, and their tokens."""

    def __init__(self, *, max_texts: int, max_tokens: int, hooks: Hooks) -> None:
        """Starts with an empty queue.

        Args:
            max_texts: Texts that may wait.
            max_tokens: Tokens that may wait.
            hooks: Called for refusals.
        """
        self._texts = Budget(max_texts)
        self._tokens = Budget(max_tokens)
        self._hooks = hooks

    @property
    def text_count(self) -> int:
        """Texts that wait."""
        return self._texts.used

    @property
    def token_count(self) -> int:
        """Their tokens."""
        return self._tokens.used

    def has_room(self, client: str, text_count: int, token_count: int) -> bool:
        """Returns whether a client may queue so much; any one request may be queued where nothing waits."""
        return self._texts.has_room(client, text_count) and (
            not self._texts.used or self._tokens.has_room(client, token_count)
        )

    def check(self, client: str, text_count: int, token_count: int) -> None:
        """Checks that a client may queue so much.

        Raises:
            ResourceExhaustedError: if the queue is full.
        """
        if self.has_room(client, text_count, token_count):
            return
        if not self._texts.has_room(client, text_count):
            reason, full = "queue_texts", f"{self._texts.used} texts wait, the queue holds {self._texts.limit}"
        else:
            reason, full = "queue_tokens", f"{self._tokens.used} tokens wait, the queue holds {self._tokens.limit}"
        self._hooks.refused(reason)
        raise ResourceExhaustedError(f"the server is full: {full}; try again later", retry_after_s=RETRY_FULL_S)

    def add(self, client: str, text_count: int, token_count: int) -> None:
        """Counts texts that a client queues, or with negative numbers takes out."""
        self._texts.add(client, text_count)
        self._tokens.add(client, token_count)
