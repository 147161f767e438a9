"""Texts and outputs of every kind for an engine on a stand-in for an accelerator, compared with transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from layertap_server.engine.encoder import Encoder
from layertap_server.model import sentence_modules
from layertap_server.model.sentence_config import SentenceConfig
from layertap_server.types import (
    Mix,
    Mixing,
    Output,
    OutputKind,
    Plan,
    Pool,
    Run,
    Spans,
    Strategy,
    Text,
    WordPooling,
    Words,
)
from support.oracle import Oracle

LAYER_COUNT, HIDDEN_SIZE = 3, 32


def text_of(length: int, *, mask: Sequence[int] | None = None, words: bool = False, types: bool = False) -> Text:
    ids = np.random.default_rng(length).integers(5, 30_000, length).astype(np.int32)
    halves = Words(
        starts=np.array([0, 0]),
        piece_counts=np.array([length // 2, 0]),
        offsets=np.zeros((2, 2), np.int64),
        first_word_count=2,
    )
    return Text(
        ids,
        attention_mask=None if mask is None else np.array(mask, np.int32),
        token_type_ids=np.arange(length, dtype=np.int32) % 2 if types else None,
        words=halves if words else None,
        spans=Spans(starts=np.array([0, length // 3]), counts=np.array([length, 1])) if words else None,
    )


def sentences_in(folder: Path, *, vector_size: int = 5) -> SentenceConfig:
    """Returns modules of every kind: on token rows, which keep their size, and on vectors."""
    modules: list[sentence_modules.Module] = []
    for name, of_tokens, size in (("rows", True, HIDDEN_SIZE), ("vectors", False, vector_size)):
        weights = folder / f"{name}.safetensors"
        safetensors.torch.save_file({"linear.weight": torch.randn(size, HIDDEN_SIZE)}, weights)
        modules.append(
            sentence_modules.Dense(
                of_tokens=of_tokens,
                in_size=HIDDEN_SIZE,
                out_size=size,
                has_bias=False,
                activation="Tanh",
                has_residual=of_tokens,
                weights=weights,
                digest="",
            )
        )
    rows, vectors = modules
    return SentenceConfig(
        max_length=64, token_modules=(rows, sentence_modules.Normalize(of_tokens=True)), vector_modules=(vectors,)
    )


def output_of(kind: OutputKind, *layers: int, size: int = HIDDEN_SIZE, **more: object) -> Output:
    return Output(kind=kind, layers=layers, row_size=size, **more)  # type: ignore[arg-type]


ALL_LAYERS = output_of(OutputKind.HIDDEN_STATES, *range(LAYER_COUNT + 1))
EVERY_OUTPUT = [
    ALL_LAYERS,
    output_of(OutputKind.HIDDEN_STATES, 2, mix=Mix(mixing=Mixing.MEAN, layers=(0, 2))),
    output_of(OutputKind.POOLER_OUTPUT, LAYER_COUNT),
    output_of(OutputKind.ATTENTIONS, 0, LAYER_COUNT - 1, size=2, heads=(1, 3)),
    *(
        output_of(
            OutputKind.POOLED_VECTORS,
            LAYER_COUNT,
            size=HIDDEN_SIZE * (1 + (strategy is Strategy.MEAN_MAX)),
            pool=Pool(strategy=strategy, normalize=strategy is Strategy.MEAN),
        )
        for strategy in Strategy
    ),
    *(
        output_of(
            OutputKind.SPAN_VECTORS,
            1,
            LAYER_COUNT,
            size=HIDDEN_SIZE * (1 + (strategy is Strategy.MEAN_MAX)),
            pool=Pool(strategy=strategy),
        )
        for strategy in Strategy
        if strategy is not Strategy.CLS  # Which is of a whole text.
    ),
    *(
        output_of(
            OutputKind.WORD_VECTORS,
            1,
            LAYER_COUNT,
            size=HIDDEN_SIZE * (1 + (pooling is WordPooling.FIRST_LAST)),
            word_pooling=pooling,
        )
        for pooling in WordPooling
    ),
]


def run_of(texts: Sequence[Text], *outputs: Output, dtype: str = "float32") -> Run:
    return Run(plan=Plan(outputs=outputs, dtype=dtype), texts=texts)


def layers_of(encoder: Encoder, texts: Sequence[Text]) -> dict[int, np.ndarray]:
    found = encoder.encode([run_of(texts, ALL_LAYERS)])
    return {rows.layer: np.frombuffer(rows.data, np.float32).reshape(-1, HIDDEN_SIZE) for rows in found}


def check_agrees(encoder: Encoder, texts: Sequence[Text], oracle: Oracle, bound: float) -> None:
    found, start = layers_of(encoder, texts), 0
    for text in texts:
        wanted, _ = oracle.run(text.input_ids, text.attention_mask, text.token_type_ids)
        for layer, states in enumerate(wanted):
            own = found[layer][start : start + text.token_count]
            assert np.abs(own - states).max() <= bound, (layer, text.token_count)
        start += text.token_count
