"""The oracle: transformers with eager attention in float32 on the CPU. It imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from layertap_server.engine.weight_reader import dummy_weights
from layertap_server.model.settings import ModelSettings
from layertap_server.parity import reference

POOLINGS = {
    "mean": lambda rows: rows.mean(0),
    "cls": lambda rows: rows[0],
    "max": lambda rows: rows.max(0),
    "last": lambda rows: rows[-1],
    "mean_sqrt_len": lambda rows: rows.sum(0) / np.sqrt(len(rows)),
    "mean_max": lambda rows: np.concatenate([rows.mean(0), rows.max(0)]),
}
"""Each pooling by its definition: from rows, shape [row_count, hidden_size], to one vector."""


class Oracle(reference.Oracle):
    """What transformers computes, for the inputs of tests."""

    def ids(self, item: Any) -> dict[str, list[int]]:
        """Tokenizes one text, pair or list of words."""
        if isinstance(item, tuple):
            return dict(self.tokenizer(*item))
        return dict(self.tokenizer(item, is_split_into_words=isinstance(item, list)))

    def attentions(
        self, ids: Sequence[int], mask: Sequence[int] | None = None, types: Sequence[int] | None = None
    ) -> list[np.ndarray]:
        """Returns the attention probabilities of all blocks, each [head_count, token_count, token_count]."""
        return [layer[0].numpy() for layer in self.forward(ids, mask, types, attentions=True).attentions]

    def text(self, item: Any) -> tuple[list[np.ndarray], Any]:
        """Tokenizes and runs one text."""
        encoded = self.ids(item)
        return self.run(encoded["input_ids"], encoded["attention_mask"], encoded.get("token_type_ids"))


class WordsReference:
    """The words of one item by hand: which tokens each has, and where it is."""

    def __init__(self, oracle: Oracle, item: Any, **cut: Any) -> None:
        side = cut.pop("truncation", "right")
        oracle.tokenizer.truncation_side = side
        parts = [[part] for part in item] if isinstance(item, tuple) else [[item]]
        options = {"is_split_into_words": isinstance(item, list), "return_offsets_mapping": True}
        encoded = oracle.tokenizer(*parts, **options, **({"truncation": "longest_first", **cut} if cut else {}))
        oracle.tokenizer.truncation_side = "right"
        self.layers, _ = oracle.run(
            encoded["input_ids"][0], None, encoded["token_type_ids"][0] if "token_type_ids" in encoded else None
        )
        spans, strings, numbers = encoded["offset_mapping"][0], encoded.sequence_ids(0), encoded.word_ids(0)
        pieces: dict[tuple[int, int], list[int]] = {}
        if isinstance(item, list):
            pieces = {(0, number): [] for number in range(len(item))}
        for position, (string, number) in enumerate(zip(strings, numbers, strict=True)):
            if number is not None:
                pieces.setdefault((string, number), []).append(position)
        self.pieces = list(pieces.values())
        self.sequence_ids = [string for string, _ in pieces]
        self.offsets = [[spans[own[0]][0], spans[own[-1]][1]] if own else [0, 0] for own in self.pieces]

    def pooled(self, way: str, rows: np.ndarray) -> np.ndarray:
        """Pools token rows to one row a word."""
        ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "first": lambda own: own[0],
            "last": lambda own: own[-1],
            "mean": lambda own: own.mean(0),
            "first_last": lambda own: np.concatenate([own[0], own[-1]]),
        }
        size = rows.shape[1] * (2 if way == "first_last" else 1)
        vectors = [ways[way](rows[own]) if own else np.zeros(size, np.float32) for own in self.pieces]
        return np.stack(vectors).astype(np.float32) if vectors else np.zeros((0, size), np.float32)


def dummy_oracle(settings: dict[str, Any], seed: int, tokenizer_folder: Path) -> Oracle:
    """Returns the oracle with the weights that --load-format dummy gives."""
    config = transformers.BertConfig(**settings, attn_implementation="eager")
    model = transformers.BertModel(config)
    model.load_state_dict(dummy_weights(ModelSettings.of(settings), seed), strict=False)
    return Oracle(model, tokenizer_folder)
