"""What the rest of the server knows of the model: its shape, its name, and what its tokenizer does. Pure data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelFacts:
    """The facts of the served model.

    Attributes:
        layer_count: L, the number of encoder blocks.
        vocab_size: Token ids are below this.
        type_vocab_size: Token types are below this; 0: the model has none.
        max_length: The most tokens of one text: the positions that tokens may have.
        default_max_length: The most tokens of one text if the request names no max_length.
        special_token_ids: Among token ids, those that count as special tokens, ascending.
        special_tokens: The ids of the tokens that the tokenizer's configuration names, by their names there.
        padding_side: Where the tokenizer's configuration pads, "right" or "left".
        has_token_type_ids: Whether the tokenizer tells the strings of a pair apart by token types.
    """

    model_id: str
    fingerprint: str
    layer_count: int
    hidden_size: int
    head_count: int
    vocab_size: int
    type_vocab_size: int
    max_length: int
    default_max_length: int
    has_pooler_output: bool
    pad_token_id: int
    special_token_ids: tuple[int, ...]
    special_tokens: Mapping[str, int]
    padding_side: str
    has_token_type_ids: bool
    model_type: str
