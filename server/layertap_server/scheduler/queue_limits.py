"""The limits of the queue."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """What may wait, be in one batch, and be unsent.

    Attributes:
        max_batch_tokens: The most tokens of a batch; a single longer text is a batch of its own.
        max_batch_bytes: The most output bytes of a batch, likewise.
        min_share_tokens: An instance takes at least so many tokens, even while others idle.
        max_queue_texts: Texts that may wait.
        max_queue_tokens: Tokens that may wait.
        max_output_bytes: Bytes computed or being computed and not yet sent, all calls together.
        max_call_output_bytes: Likewise for one call, but always one text; and bytes of the mixes of one batch.
    """

    max_batch_tokens: int
    max_batch_bytes: int
    min_share_tokens: int
    max_queue_texts: int
    max_queue_tokens: int
    max_output_bytes: int
    max_call_output_bytes: int
