"""A small random checkpoint, and what this server makes of a folder against what transformers makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers

from layertap_server.engine.encoder import Encoder
from layertap_server.engine.weight_reader import dummy_weights
from layertap_server.model.checkpoint import Checkpoint, find
from layertap_server.model.settings import ModelSettings
from layertap_server.types import Output, OutputKind, Plan, Run, Text
from support import BASE_SETTINGS, BOUND, worst, write_settings

SMALL = BASE_SETTINGS | {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Paris", "paris", "I", "i", "love", "É", "é", "e", "##s", "##S"]
VOCABULARY = WORDS + [f"[unused{n}]" for n in range(60 - len(WORDS))]

Weights = dict[str, torch.Tensor]


def save(folder: Path, settings: dict[str, Any], weights: Weights | None = None) -> Path:
    """Writes a checkpoint; without weights those of a new random model whose parts are all in use."""
    write_settings(folder, settings)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    weights = dummy_weights(ModelSettings.of(settings | {"initializer_range": 0.3}), 1) if weights is None else weights
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def find_in(folder: Path | str, **options: Any) -> Checkpoint:
    return find(
        **{"model_id": str(folder), "revision": "", "name": "", "load_format": "safetensors", "seed": 0} | options
    )


def oracle_of(settings: dict[str, Any], weights: Weights) -> transformers.BertModel:
    model = transformers.BertModel(transformers.BertConfig(**settings, attn_implementation="eager"))
    result = model.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys
    assert all(name.startswith("pooler.") or name.endswith("_ids") for name in result.missing_keys)
    return model.float().eval()


def inputs(settings: dict[str, Any]) -> list[Text]:
    random = np.random.default_rng(0)
    length = settings["max_position_embeddings"]
    texts = []
    for count in (1, 2, 7, 7, 30, length):
        ids = random.integers(0, settings["vocab_size"], count).astype(np.int32)
        types = random.integers(0, settings["type_vocab_size"], count).astype(np.int32)
        mask = random.integers(0, 2, count).astype(np.int32)
        texts += [Text(ids), Text(ids, attention_mask=None if mask.all() else mask), Text(ids, token_type_ids=types)]
    texts.append(Text(ids, attention_mask=np.zeros(length, np.int32)))
    return texts


def encode(encoder: Encoder, settings: dict[str, Any], texts: list[Text]) -> dict[tuple[int, int], np.ndarray]:
    """Returns the arrays of all layers (output 0) and of the pooler (output 1, if there is one)."""
    size, last = settings["hidden_size"], settings["num_hidden_layers"]
    outputs = [Output(kind=OutputKind.HIDDEN_STATES, layers=tuple(range(last + 1)), row_size=size)]
    if encoder.has_pooler:
        outputs.append(Output(kind=OutputKind.POOLER_OUTPUT, layers=(last,), row_size=size))
    plan = Plan(outputs=tuple(outputs), dtype="float32")
    found = {}
    for rows in encoder.encode([Run(plan=plan, texts=texts)]):
        assert not rows.failures
        found[rows.output_index, rows.layer] = np.frombuffer(rows.data, np.float32).reshape(-1, size)
    return found


@torch.inference_mode()
def check(folder: Path, settings: dict[str, Any], oracle: transformers.BertModel, *, pooler: bool = True) -> None:
    encoder = Encoder(find_in(folder), device="cpu", dtype="float32")
    assert encoder.has_pooler is pooler
    texts = inputs(settings)
    found = encode(encoder, settings, texts)
    assert len(found) == settings["num_hidden_layers"] + 1 + pooler
    end = 0
    for n, text in enumerate(texts):
        count = text.token_count
        out = oracle(
            input_ids=torch.from_numpy(text.input_ids).long()[None],
            attention_mask=torch.from_numpy(
                np.ones(count, np.int32) if text.attention_mask is None else text.attention_mask
            )[None],
            token_type_ids=torch.from_numpy(
                np.zeros(count, np.int32) if text.token_type_ids is None else text.token_type_ids
            ).long()[None],
            output_hidden_states=True,
        )
        for layer, wanted in enumerate(out.hidden_states):
            assert worst(found[0, layer][end : end + count], wanted[0].numpy()) <= BOUND, (n, layer)
        if pooler:
            last = settings["num_hidden_layers"]
            assert worst(found[1, last][n], out.pooler_output[0].numpy()) <= BOUND, n
        end += count
