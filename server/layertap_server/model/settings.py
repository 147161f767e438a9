"""What config.json says of a model, under BERT's keys.

What config.json leaves out has transformers' default for the type. A setting that changes the numbers and that this
server does not follow is refused by name: a model is served as transformers computes it, or not at all.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from layertap_server.model.architectures import Architecture, architecture_of
from layertap_server.model.files import CheckpointError, read_json, reason_of

_VALUES: Final = ("hidden_act", "layer_norm_eps", "initializer_range", "pad_token_id")

_MAX_LAYERS: Final = 1024
_MAX_COUNT: Final = 10**18
_LEARNED: Final = ("prelu", "xielu")
"""The activations of transformers that have weights of their own."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """The settings that the encoder is built from; fields are BERT's keys of config.json.

    Attributes:
        embedding_size: Values of an embedding before it is projected to hidden_size.
        type_vocab_size: Token types; 0: the model has none.
        pad_token_id: The id of padding; None: config.json has none.
    """

    model_type: str = "bert"
    vocab_size: int
    hidden_size: int
    embedding_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int | None = 0

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> ModelSettings:
        """Returns the settings in a mapping with BERT's keys, such as `read_settings` gives."""
        found = {field.name: settings[field.name] for field in dataclasses.fields(cls) if field.name in settings}
        if not architecture_of({"model_type": "bert", **found}).projects:
            found["embedding_size"] = found["hidden_size"]
        return cls(**found)

    @property
    def architecture(self) -> Architecture:
        """How the model differs from BERT."""
        return architecture_of({"model_type": self.model_type})

    @property
    def padding_position_id(self) -> int | None:
        """The id of padding, which is its position too; other tokens count from the next. None: they count from 0."""
        return self.pad_token_id if self.architecture.pads_positions else None

    @property
    def position_count(self) -> int:
        """The most tokens that a text may have."""
        padding = self.padding_position_id
        return self.max_position_embeddings - (0 if padding is None else padding + 1)


def read_settings(folder: Path) -> dict[str, Any]:
    """Returns the contents of config.json, with all settings that this server reads under BERT's keys.

    Raises:
        CheckpointError: if it cannot be read, or describes a model that this server does not compute.
    """
    try:
        found = read_json(folder / "config.json")
    except FileNotFoundError as exc:
        raise CheckpointError(f"the model folder {folder.name!r} has no config.json; check --model-id") from exc
    if not isinstance(found, dict):
        raise CheckpointError("config.json is no object with a model_type; fetch the model again")
    architecture = architecture_of(found)
    _check_kind(found)
    settings = found | _with_defaults(found, architecture)
    _check_settings(settings, architecture)
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


def _with_defaults(found: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Returns the settings that this server reads, as transformers reads them."""
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)  # What it warns of is refused below, or changes nothing.
    try:
        config = transformers.AutoConfig.for_model(found["model_type"]).from_dict(dict(found))
    except Exception as exc:  # Its checks raise what they like.
        raise CheckpointError(f"transformers refuses config.json ({reason_of(exc)}); correct it") from exc
    read = (key for key in (*architecture.counts, *_VALUES) if key not in architecture.constants)
    return {key: getattr(config, architecture.key(key)) for key in read} | dict(architecture.constants)


def _check_settings(settings: Mapping[str, Any], architecture: Architecture) -> None:
    key = architecture.key
    for count in architecture.counts:
        value = settings[count]
        if type(value) is not int or not 1 <= value <= _MAX_COUNT:
            raise CheckpointError(
                f"config.json has {key(count)} {value!r:.80}; it must be a whole number from 1 to {_MAX_COUNT}"
            )
    activation = settings["hidden_act"]
    if not isinstance(activation, str):
        raise CheckpointError(f"config.json has {key('hidden_act')} {activation!r:.80}; it must be a name")
    if activation in _LEARNED:
        raise CheckpointError(
            f"config.json says {key('hidden_act')} {activation!r}, which has learned weights of its own; layertap "
            "serves activations without weights"
        )
    for name in ("layer_norm_eps", "initializer_range"):
        value = settings[name]
        if type(value) not in (int, float) or not 0 <= value < 1e6:
            raise CheckpointError(f"config.json has {name} {value!r:.80}; it must be a small number from 0")
    if settings["hidden_size"] % settings["num_attention_heads"]:
        raise CheckpointError(
            f"config.json has {key('hidden_size')} {settings['hidden_size']}, "
            f"which {settings['num_attention_heads']} heads do not divide"
        )
    if architecture.pads_positions:
        _check_padding(settings)
    _check_size(ModelSettings.of(settings))


def _check_padding(settings: Mapping[str, Any]) -> None:
    padding, end = settings["pad_token_id"], min(settings["vocab_size"], settings["max_position_embeddings"] - 1)
    if type(padding) is not int or not 0 <= padding < end:
        raise CheckpointError(
            f"config.json has pad_token_id {padding!r:.80}; positions of a {settings['model_type']} count from the one "
            f"after it, so it must be a whole number from 0 to {end - 1}"
        )


def _check_size(settings: ModelSettings) -> None:
    architecture = settings.architecture
    if settings.num_hidden_layers > _MAX_LAYERS:
        raise CheckpointError(
            f"config.json has {architecture.key('num_hidden_layers')} {settings.num_hidden_layers:.4g}, the most is "
            f"{_MAX_LAYERS}"
        )
    needed, there = 4 * _parameter_count(settings), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        largest = max(architecture.counts, key=lambda key: int(getattr(settings, key)))
        raise CheckpointError(
            f"the model that config.json describes takes {needed / 1e9:.3g} GB in float32, this machine has "
            f"{there / 1e9:.3g} GB; check {architecture.key(largest)} ({getattr(settings, largest):.4g})"
        )


def _parameter_count(settings: ModelSettings) -> int:
    hidden, embedded = settings.hidden_size, settings.embedding_size
    rows = settings.vocab_size + settings.max_position_embeddings + settings.type_vocab_size
    block = hidden * (4 * hidden + 2 * settings.intermediate_size)
    return int(embedded * rows + settings.num_hidden_layers * block)
