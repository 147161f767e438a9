"""The size law of a message: what each part of an answer takes on the wire. The only owner of it.

A size is estimated from counts alone, before anything of the answer is made.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from layertap.types import Limits
from layertap_server.types import Plan, Text

HEAD_BYTES: Final = 256
"""Room in a streamed message for all but its rows and its lists."""

TEXT_BYTES: Final = 64
"""Room for what an answer says of one text besides its rows and lists."""

TOKEN_BYTES: Final = 48
"""Room for one token with all its numbers, in the vocabularies of BERT."""

LEAST_TOKEN_BYTES: Final = 9
"""The fewest bytes of one token in an answer: an empty piece and eight numbers, without the tags of the lists."""

WORD_BYTES: Final = 12
"""Room for the piece count and the offsets of one word."""

HELD_TEXT_BYTES: Final = 1024
"""What the server holds of one text besides its tokens and words, from its tokenizing to its answer."""

HELD_TOKEN_BYTES: Final = 16
"""Likewise of one token."""

HELD_ENCODED_TOKEN_BYTES: Final = 192
"""Likewise of one token where the tokenizer's own result is kept, measured with tokens of one character."""

HELD_WORD_BYTES: Final = 40
"""Likewise of one word."""

ID_BYTES: Final = 4
"""What one token id of a Decode request counts against the size of its answer."""


def list_bytes(plan: Plan, text: Text) -> int:
    """Returns room for the tokens and the words of one text, as far as the plan asks for them."""
    return TOKEN_BYTES * text.token_count * plan.return_tokens + WORD_BYTES * text.word_count


def response_bytes(plan: Plan, texts: Iterable[Text]) -> int:
    """Returns about how many bytes an answer of whole results takes."""
    return sum(plan.byte_counts.of(text) + list_bytes(plan, text) + TEXT_BYTES for text in texts)


def held_bytes(text: Text, *, encoded: bool) -> int:
    """Returns about how much memory the server holds for a tokenized text until it is answered."""
    token_bytes = HELD_ENCODED_TOKEN_BYTES if encoded else HELD_TOKEN_BYTES
    return HELD_TEXT_BYTES + token_bytes * text.token_count + HELD_WORD_BYTES * text.word_count


def max_input_bytes(limits: Limits, max_length: int) -> int:
    """Returns the most bytes of a text within the limits: words of one character take most, or ids with masks."""
    return max(8 * limits.max_character_count, 32 * max_length) + (4 << 10)
