"""What config.json says of the model, with transformers' defaults for what it leaves out.

A setting that changes the numbers and that this server does not follow is refused by name: a model is served as
transformers computes it, or not at all.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from layertap_server.model.files import CheckpointError, read_json, reason_of

COUNTS: Final = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)
_DEFAULTED: Final = (*COUNTS, "hidden_act", "layer_norm_eps", "initializer_range", "pad_token_id")
"""The keys that are read; those that config.json leaves out have the defaults of transformers' BertConfig."""

_MAX_LAYERS: Final = 1024
_LEARNED: Final = ("prelu", "xielu")
"""The activations of transformers that have weights of their own."""


def read_settings(folder: Path) -> dict[str, Any]:
    """Returns the contents of config.json, with all keys that this server reads.

    Raises:
        CheckpointError: If it cannot be read, or describes a model that this server does not compute.
    """
    try:
        found = read_json(folder / "config.json")
    except FileNotFoundError as exc:
        raise CheckpointError(f"the model folder {folder.name!r} has no config.json; check --model-id") from exc
    kind = found.get("model_type") if isinstance(found, dict) else None
    if not isinstance(found, dict) or kind != "bert":
        raise CheckpointError(f"config.json says model_type {kind!r:.80}; layertap serves model_type 'bert' only")
    _check_kind(found)
    settings = found | _with_defaults(found)
    _check_sizes(settings, found)
    return settings


def _check_kind(found: Mapping[str, Any]) -> None:
    positions = found.get("position_embedding_type") or "absolute"
    if positions != "absolute":
        raise CheckpointError(
            f"config.json says position_embedding_type {positions!r:.80}; layertap serves 'absolute' only, because "
            "relative positions change the attention itself"
        )
    for key in ("is_decoder", "add_cross_attention"):
        if found.get(key):
            raise CheckpointError(
                f"config.json says {key}; layertap serves encoders only, where every token attends to all others; "
                "choose the encoder's checkpoint"
            )
    for key in ("pruned_heads", "quantization_config"):
        if found.get(key):
            raise CheckpointError(f"config.json has {key}, which layertap does not follow; save the model without it")
    chunk = found.get("chunk_size_feed_forward") or 0
    if chunk not in (0, 1):
        raise CheckpointError(
            f"config.json has chunk_size_feed_forward {chunk!r:.80}, with which transformers refuses every text whose "
            "length it does not divide; set it to 0, which gives the same numbers"
        )
    if found.get("hidden_act") in _LEARNED:
        raise CheckpointError(
            f"config.json says hidden_act {found['hidden_act']!r}, which has learned weights of its own; layertap "
            "serves activations without weights"
        )


def _with_defaults(found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys that this server reads, as transformers reads them."""
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)  # What it warns of is refused below, or changes nothing.
    try:
        config = transformers.BertConfig.from_dict(dict(found))
    except Exception as exc:  # Its checks raise what they like.
        raise CheckpointError(f"transformers refuses config.json ({reason_of(exc)}); correct it") from exc
    return {key: getattr(config, key) for key in _DEFAULTED}


def _check_sizes(settings: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for key in COUNTS:
        value = settings[key]
        if type(value) is not int or value < 1:
            raise CheckpointError(f"config.json has {key} {value!r:.80}; it must be a whole number from 1")
    if not isinstance(settings["hidden_act"], str):
        raise CheckpointError(f"config.json has hidden_act {settings['hidden_act']!r:.80}; it must be a name")
    for key in ("layer_norm_eps", "initializer_range"):
        value = settings[key]
        if type(value) not in (int, float) or not 0 <= value < 1e6:
            raise CheckpointError(f"config.json has {key} {value!r:.80}; it must be a small number from 0")
    if settings["hidden_size"] % settings["num_attention_heads"]:
        raise CheckpointError(
            f"config.json has hidden_size {settings['hidden_size']}, "
            f"which {settings['num_attention_heads']} heads do not divide"
        )
    if settings["num_hidden_layers"] > _MAX_LAYERS:
        raise CheckpointError(
            f"config.json has num_hidden_layers {settings['num_hidden_layers']:.4g}, the most is {_MAX_LAYERS}"
        )
    needed, there = 4 * _parameter_count(settings), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        largest = max(COUNTS, key=lambda key: int(settings[key]))
        raise CheckpointError(
            f"the model that config.json describes takes {needed / 1e9:.3g} GB in float32, this machine has "
            f"{there / 1e9:.3g} GB; check {largest} ({settings[largest]:.4g})"
        )


def _parameter_count(settings: Mapping[str, Any]) -> int:
    hidden = settings["hidden_size"]
    rows = settings["vocab_size"] + settings["max_position_embeddings"] + settings["type_vocab_size"]
    block = hidden * (4 * hidden + 2 * settings["intermediate_size"])
    return int(hidden * rows + settings["num_hidden_layers"] * block)


def expected_shapes(settings: Mapping[str, Any], *, pooler: bool) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of a model, by transformers' name."""
    hidden, intermediate = settings["hidden_size"], settings["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(prefix: str) -> None:
        shapes[f"{prefix}.LayerNorm.weight"] = shapes[f"{prefix}.LayerNorm.bias"] = (hidden,)

    def linear(name: str, out_size: int, in_size: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out_size, in_size), (out_size,)

    shapes["embeddings.word_embeddings.weight"] = settings["vocab_size"], hidden
    shapes["embeddings.position_embeddings.weight"] = settings["max_position_embeddings"], hidden
    shapes["embeddings.token_type_embeddings.weight"] = settings["type_vocab_size"], hidden
    norm("embeddings")
    for index in range(settings["num_hidden_layers"]):
        prefix = f"encoder.layer.{index}"
        for part in ("query", "key", "value"):
            linear(f"{prefix}.attention.self.{part}", hidden, hidden)
        linear(f"{prefix}.attention.output.dense", hidden, hidden)
        norm(f"{prefix}.attention.output")
        linear(f"{prefix}.intermediate.dense", intermediate, hidden)
        linear(f"{prefix}.output.dense", hidden, intermediate)
        norm(f"{prefix}.output")
    if pooler:
        linear("pooler.dense", hidden, hidden)
    return shapes
