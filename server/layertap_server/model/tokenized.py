"""A text after tokenizing, and its words."""

from __future__ import annotations

import dataclasses

import numpy as np
import tokenizers

from layertap_server.types import Indices, Text, Words


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)  # Not frozen: one a text is made, in half of the time.
class Tokenized:
    """A text after tokenizing.

    Attributes:
        truncated: Whether tokens were cut.
        encoding: The tokenizer's own result; None for token ids.
        given_word_count: How many words it came as; None: it did not come as words.
    """

    text: Text
    truncated: bool = False
    encoding: tokenizers.Encoding | None = None
    given_word_count: int | None = None

    def split(self) -> Tokenized:
        """Returns it with the words of its text, which must not be token ids."""
        assert self.encoding is not None
        word_ids = np.array([-1 if word is None else word for word in self.encoding.word_ids], np.int64)
        string_ids = np.array([-1 if string is None else string for string in self.encoding.sequence_ids], np.int64)
        spans = np.array(self.encoding.offsets, np.int64).reshape(-1, 2)
        inside = np.flatnonzero(word_ids >= 0)
        # A word begins where its number or its string is not that of the token before.
        names = np.stack([word_ids[inside], string_ids[inside]])
        begins = np.flatnonzero((np.diff(names, axis=1, prepend=-1) != 0).any(axis=0))
        starts, piece_counts = inside[begins], np.diff(begins, append=len(inside))
        offsets = np.stack([spans[starts, 0], spans[starts + piece_counts - 1, 1]], axis=1)
        first_word_count = int((string_ids[starts] == 0).sum())
        if self.given_word_count is not None:
            numbers, first_word_count = word_ids[starts], self.given_word_count
            starts = _spread(starts, numbers, first_word_count)
            piece_counts = _spread(piece_counts, numbers, first_word_count)
            offsets = _spread(offsets, numbers, first_word_count)
        words = Words(starts=starts, piece_counts=piece_counts, offsets=offsets, first_word_count=first_word_count)
        return dataclasses.replace(self, text=dataclasses.replace(self.text, words=words))


def _spread(values: Indices, places: Indices, count: int) -> Indices:
    """Returns so many entries: values at their places, zeros elsewhere."""
    spread = np.zeros((count, *values.shape[1:]), np.int64)
    spread[places] = values
    return spread
