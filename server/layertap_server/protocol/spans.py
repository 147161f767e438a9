"""The spans of a text, checked and turned into ranges of its tokens.

A fault is refused by the item and the number of the span. How many there are is checked before an array is made.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from layertap.errors import InvalidArgumentError, counted
from layertap.v1 import embedding_pb2 as pb
from layertap_server.model.tokenized import Tokenized
from layertap_server.types import Indices, Plan, Spans

_MOST_TOKENS: Final = 64
"""How often the spans of a text together may hold as many tokens as it has."""


def check_asked(message: pb.Input, plan: Plan, label: str) -> None:
    """Checks that something is made of the spans of a text, if it has any.

    Raises:
        InvalidArgumentError: if no output has a row for each.
    """
    if message.HasField("spans") and not plan.has_spans:
        raise InvalidArgumentError(
            f"{label} has spans, of which no output is made; ask for span_vectors, or leave them out"
        )


def spans_of(message: pb.Input, result: Tokenized, label: str, *, prompt_length: int) -> Spans:
    """Returns which tokens each span of a text holds, which perhaps was cut, behind a prompt of so many characters.

    Raises:
        InvalidArgumentError: if a span is out of bounds or holds no token, or all together hold too many.
    """
    given, token_count = message.spans, result.text.token_count
    most = _MOST_TOKENS * token_count
    if len(given.bounds) % 2:
        raise InvalidArgumentError(
            f"{label}.spans.bounds has {counted(len(given.bounds), 'entry', 'entries')}; send two for each span"
        )
    if len(given.bounds) > 2 * most:
        raise InvalidArgumentError(
            f"{label} has {len(given.bounds) // 2} spans for {token_count} tokens, the most is {most}; send fewer"
        )
    bounds = np.array(given.bounds, np.int64).reshape(-1, 2)
    if given.unit == pb.SPAN_UNIT_TOKEN:
        _check_within(bounds, token_count, "tokens", label)
        firsts, ends = bounds.T
    elif given.unit in (pb.SPAN_UNIT_UNSPECIFIED, pb.SPAN_UNIT_CHARACTER):
        if message.WhichOneof("kind") != "text":
            raise InvalidArgumentError(
                f"{label} has spans of characters, which only strings have; count in tokens (SPAN_UNIT_TOKEN)"
            )
        _check_within(bounds, len(message.text), "characters", label)
        firsts, ends = _tokens_of(bounds + prompt_length, result)
    else:
        raise InvalidArgumentError(
            f"{label}.spans.unit has the unknown value {given.unit}; use one that the contract names"
        )
    counts = ends - firsts
    if int(np.maximum(counts, 0).sum()) > most:
        raise InvalidArgumentError(
            f"the spans of {label} hold more than {most} tokens together, {_MOST_TOKENS} times those of the text; send "
            "fewer, or shorter ones"
        )
    mask = result.text.attention_mask
    held = counts if mask is None else np.append(0, np.cumsum(mask))[ends] - np.append(0, np.cumsum(mask))[firsts]
    if (held <= 0).any():
        raise InvalidArgumentError(
            f"{label}.spans[{int(np.argmax(held <= 0))}] holds no token, after truncation and masks; leave it out"
        )
    return Spans(starts=firsts, counts=counts)


def _check_within(bounds: Indices, length: int, unit: str, label: str) -> None:
    is_bad = (bounds[:, 0] < 0) | (bounds[:, 0] >= bounds[:, 1]) | (bounds[:, 1] > length)
    if is_bad.any():
        raise InvalidArgumentError(
            f"{label}.spans[{int(np.argmax(is_bad))}] is empty or out of bounds; 0 <= start < end <= {length} {unit}"
        )


def _tokens_of(bounds: Indices, result: Tokenized) -> tuple[Indices, Indices]:
    """Returns the first token of each span of characters, and the one past its last, which may be no later."""
    assert result.encoding is not None
    offsets = np.array(result.encoding.offsets, np.int64).reshape(-1, 2)
    is_own = (np.array(result.encoding.special_tokens_mask) == 0) & (offsets[:, 0] < offsets[:, 1])
    own = np.flatnonzero(is_own)
    if not len(own):
        return np.zeros(len(bounds), np.int64), np.zeros(len(bounds), np.int64)
    starts, ends = np.maximum.accumulate(offsets[own].T, axis=1)
    firsts = np.searchsorted(ends, bounds[:, 0], side="right")
    lasts = np.searchsorted(starts, bounds[:, 1], side="left") - 1
    is_empty = firsts > lasts
    first_tokens = own[np.minimum(firsts, len(own) - 1)]
    return first_tokens, np.where(is_empty, first_tokens, own[np.maximum(lasts, 0)] + 1)
