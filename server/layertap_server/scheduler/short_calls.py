"""Which calls are so short beside a batch that it pauses for them.

A call is taken whole or not at all: texts in bulk wait for a batch of their own, which computes them faster. It is held
against the longest text and not against the batch: many callers of short texts make batches of many, and a batch of
theirs that paused for the next few would cost them a quarter of their rate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from layertap_server.scheduler.call import BatchPart, Call

LOOK: Final = 4
"""So many calls of each connection are looked at."""
_SHARE: Final = 4
"""All short calls of one pause together have at most this part of the tokens of the longest text of the batch."""


def short_calls(
    calls: Iterable[Call],
    running: Sequence[BatchPart],
    *,
    max_batch_bytes: int,
    max_mix_bytes: int,
    has_room: Callable[[Call, int], bool],
) -> Iterator[tuple[Call, int]]:
    """Yields the calls that may run while a batch pauses, each with the output bytes of its texts.

    Args:
        calls: Calls that wait, in their order.
        running: The batch.
        max_batch_bytes: The most output bytes of a batch.
        max_mix_bytes: The most bytes of mixes, those of the batch included.
        has_room: Whether a call may have so many more output bytes.
    """
    tokens = max(len(text.input_ids) for part in running for text in part.texts) // _SHARE
    bytes_left = max_batch_bytes // _SHARE
    mix_bytes = max_mix_bytes - sum(part.token_count * part.call.plan.mix_token_bytes for part in running)
    own, now = {part.call for part in running}, time.monotonic()
    for call in calls:
        count = call.waiting_token_count
        if count > tokens or call in own or any(waiting.text.windows is not None for waiting in call.waiting):
            continue
        if call.expires_at is not None and call.expires_at <= now:
            continue
        size, mixed = sum(call.bytes_of(waiting.text) for waiting in call.waiting), count * call.plan.mix_token_bytes
        if size <= bytes_left and mixed <= mix_bytes and has_room(call, size):
            tokens, bytes_left, mix_bytes = tokens - count, bytes_left - size, mix_bytes - mixed
            yield call, size
