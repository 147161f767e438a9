"""One text as the model sees it: its token ids, its masks and its words."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Indices = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Words:
    """Which tokens of a text make which words. The tokens of a word lie one after the other.

    Attributes:
        starts: Shape: [word_count]; the first token of each word.
        piece_counts: Shape: [word_count]; how many tokens each word has, perhaps none.
        offsets: Shape: [word_count, 2]; start and end in the text, in Unicode code points.
        first_word_count: How many words belong to the first string of a pair; else all.
    """

    starts: Indices
    piece_counts: Indices
    offsets: Indices
    first_word_count: int


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Text:
    """One text as the model sees it.

    Attributes:
        input_ids: Shape: [token_count].
        attention_mask: Shape: [token_count], with at least one 0. None: all 1.
        token_type_ids: Shape: [token_count], with at least one not 0. None: all 0.
        special_tokens_mask: Shape: [token_count]; 1 for special tokens. None: no output asks for it, or all 0.
        words: Its words. None: no output asks for them, or it has none.
    """

    input_ids: Ids
    attention_mask: Ids | None = None
    token_type_ids: Ids | None = None
    special_tokens_mask: Ids | None = None
    words: Words | None = None

    @property
    def token_count(self) -> int:
        """How many rows each layer has for this text."""
        return len(self.input_ids)

    @property
    def word_count(self) -> int:
        """How many words it has, as far as they are asked for."""
        return 0 if self.words is None else len(self.words.piece_counts)
