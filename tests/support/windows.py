"""Long texts by hand: the windows of transformers' tokenizer, and each token's row from the best of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from support.oracle import Oracle


class WindowsReference:
    """All layers of one text that runs as windows.

    Attributes:
        count: How many windows it has.
        token_count: Tokens of the whole text.
        layers: One array a layer. Shape: [token_count, hidden_size].
        pooler_output: That of the first window; None: the model has none.
    """

    def __init__(self, oracle: Oracle, item: Any, *, max_length: int, stride: int) -> None:
        is_words = isinstance(item, list)
        self.whole = oracle.tokenizer(item, is_split_into_words=is_words, return_special_tokens_mask=True)
        encoded = oracle.tokenizer(
            item,
            is_split_into_words=is_words,
            truncation=True,
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
        )
        windows = encoded["input_ids"]
        self.count = len(windows)
        mask = self.whole["special_tokens_mask"]
        self.token_count = len(mask)
        # All served tokenizers put one special token before a text and one after it.
        assert mask == [1, *[0] * (self.token_count - 2), 1]
        contents, start = [], 0
        for ids in windows:
            contents.append((start, start + len(ids) - 2))
            start += max_length - 2 - stride
        found = [oracle.run(ids, None, None) for ids in windows]
        self.pooler_output = found[0][1]
        places = [(0, 0), *(_best(contents, token) for token in range(self.token_count - 2))]
        places.append((self.count - 1, len(windows[-1]) - 1))
        self.layers = [
            np.stack([found[window][0][layer][row] for window, row in places]) for layer in range(len(found[0][0]))
        ]


def tokens_of(oracle: Oracle, text: str, span: tuple[int, int]) -> list[int]:
    """Returns the tokens of a text that have a character of a span."""
    found = oracle.tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    rows = zip(found["offset_mapping"], found["special_tokens_mask"], strict=True)
    return [n for n, ((a, b), special) in enumerate(rows) if not special and a < span[1] and b > span[0]]


def _best(contents: list[tuple[int, int]], token: int) -> tuple[int, int]:
    """Returns the window in which the nearer edge is farthest from a token, and the token's row in it."""
    distances = [min(token - start, end - 1 - token) for start, end in contents]
    window = distances.index(max(distances))
    return window, token - contents[window][0] + 1
