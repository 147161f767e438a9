"""Results made up by the tests, as a server's answer would become them: two texts of 5 and 3 tokens, 4 values wide."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from layertap import Embedding, HiddenStates, ModelRef, Timings, Tokens

COUNTS = np.array([5, 3])
SIZE = 4
NASTY = "<script>alert('&')</script>"
MODEL = f"bert{NASTY}"


def numbers(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32).astype(dtype)


def tokens() -> Tokens:
    inside = np.arange(5) < COUNTS[:, None]
    ids = np.where(inside, [[101, 1045, 2293, 3000, 102], [101, 7592, 102, 0, 0]], 0)
    return Tokens(
        tokens=[["[CLS]", "i", "love", NASTY, "[SEP]"], ["[CLS]", "hello", "[SEP]"]],
        input_ids=ids,
        attention_mask=inside.astype(np.int64),
        token_type_ids=np.zeros((2, 5), np.int64),
        special_tokens_mask=1 - inside,
        word_ids=np.where(inside, np.arange(5) - 1, -1),
        offset_mapping=np.stack([np.arange(10).reshape(2, 5), np.arange(1, 11).reshape(2, 5)], 2),
        token_counts=COUNTS,
        truncated=np.array([False, True]),
    )


def embedding(
    *, layers: tuple[int, ...] = (), pools: int = 0, pooler: bool = False, dtype: str = "float32", **changes: Any
) -> Embedding:
    ragged = {layer: numbers(int(COUNTS.sum()), SIZE, dtype=dtype) + layer for layer in layers}
    made = Embedding(
        hidden_states=HiddenStates(ragged=ragged, token_counts=COUNTS, layer_count=6),
        pools=tuple(numbers(2, SIZE + n, dtype=dtype) for n in range(pools)),
        token_counts=COUNTS,
        truncated=np.array([False, True]),
        window_counts=np.array([1, 1]),
        attention_mask=(np.arange(5) < COUNTS[:, None]).astype(np.int64),
        model=ModelRef(model_id=MODEL, fingerprint="f" * 64),
        timings=Timings(queue_time_ns=1, tokenize_time_ns=2, compute_time_ns=3),
        _pooler_output=numbers(2, SIZE, dtype=dtype) if pooler else None,
        _tokens=None,
    )
    return dataclasses.replace(made, **changes)


FULL = {"layers": (0, 5, 6), "pools": 2, "pooler": True}
