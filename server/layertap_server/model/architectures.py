"""Which models are served: how each model_type maps onto the one encoder, and what config.json says of a model.

BERT's names are the names of this server, for settings and for weights; the other types are rows of a table that says
what they spell or count otherwise. What config.json leaves out has transformers' default for the type. A setting that
changes the numbers and that this server does not follow is refused by name: a model is served as transformers computes
it, or not at all.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from layertap_server.model.files import CheckpointError, read_json, reason_of

_COUNTS: Final = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)
_VALUES: Final = ("hidden_act", "layer_norm_eps", "initializer_range", "pad_token_id")

_MAX_LAYERS: Final = 1024
_LEARNED: Final = ("prelu", "xielu")
"""The activations of transformers that have weights of their own."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How one model_type differs from BERT.

    Attributes:
        prefix: What the names of its weights begin with where they were saved with a head.
        keys: The keys of config.json that it spells otherwise: BERT's key, and its own.
        constants: Settings that config.json does not change.
        names: The parts of the names of weights that it spells otherwise: BERT's part, and its own.
        pads_positions: Whether padding tokens have the position pad_token_id, and all others count from the next.
        projects: Whether embeddings have a size of their own, embedding_size, and are projected to the hidden size.
        has_pooler: Whether it may have a pooler.
    """

    prefix: str
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    names: tuple[tuple[str, str], ...] = ()
    pads_positions: bool = False
    projects: bool = False
    has_pooler: bool = True

    @property
    def counts(self) -> tuple[str, ...]:
        """The settings of config.json that are counts."""
        counts = (*_COUNTS, "embedding_size") if self.projects else _COUNTS
        return tuple(key for key in counts if key not in self.constants)

    def key(self, key: str) -> str:
        """Returns how its config.json spells a setting."""
        return self.keys.get(key, key)

    def own_name(self, name: str) -> str:
        """Returns how it spells the name of a weight, without the prefix."""
        for common, own in self.names:
            name = name.replace(common, own)
        return name

    def common_name(self, name: str) -> str:
        """Returns the name that a weight has in BertModel, without a prefix and in today's spelling."""
        name = name.removeprefix(self.prefix)
        for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
            if name.endswith(old):
                name = name.removesuffix(old) + new
        for common, own in self.names:
            name = name.replace(own, common)
        return name

    def is_own(self, name: str) -> bool:
        """Whether a weight, by its name in BertModel, is the encoder's; all others are heads, which are not read."""
        return name.startswith(("embeddings.", "embeddings_project.", "encoder.")) or (
            self.has_pooler and name.startswith("pooler.")
        )

    def embedding_size(self, settings: Mapping[str, Any]) -> int:
        """Returns how many values an embedding has before it is projected."""
        return int(settings["embedding_size" if self.projects else "hidden_size"])

    def first_position(self, settings: Mapping[str, Any]) -> int:
        """Returns the position of the first token of a text."""
        return settings["pad_token_id"] + 1 if self.pads_positions else 0

    def position_count(self, settings: Mapping[str, Any]) -> int:
        """Returns how many tokens a text may have."""
        return int(settings["max_position_embeddings"]) - self.first_position(settings)


_ROBERTA: Final = Architecture(prefix="roberta.", pads_positions=True)
_ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "bert": Architecture(prefix="bert."),
    "camembert": _ROBERTA,
    "distilbert": Architecture(
        prefix="distilbert.",
        keys={
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
        },
        constants={"type_vocab_size": 0, "layer_norm_eps": 1e-12},
        names=(  # A part that is the end of another comes after it.
            ("encoder.", "transformer."),
            (".attention.self.query.", ".attention.q_lin."),
            (".attention.self.key.", ".attention.k_lin."),
            (".attention.self.value.", ".attention.v_lin."),
            (".attention.output.dense.", ".attention.out_lin."),
            (".attention.output.LayerNorm.", ".sa_layer_norm."),
            (".intermediate.dense.", ".ffn.lin1."),
            (".output.dense.", ".ffn.lin2."),
            (".output.LayerNorm.", ".output_layer_norm."),
        ),
        has_pooler=False,
    ),
    "electra": Architecture(prefix="electra.", projects=True, has_pooler=False),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}


def architecture_of(settings: Mapping[str, Any]) -> Architecture:
    """Returns the architecture that the settings of a model name.

    Raises:
        CheckpointError: If layertap does not serve it.
    """
    kind = settings.get("model_type")
    if isinstance(kind, str) and kind in _ARCHITECTURES:
        return _ARCHITECTURES[kind]
    raise CheckpointError(
        f"config.json says model_type {kind!r:.80}; layertap serves {', '.join(_ARCHITECTURES)}, whose blocks are "
        "those of BERT; choose a checkpoint of one of these"
    )


def read_settings(folder: Path) -> dict[str, Any]:
    """Returns the contents of config.json, with all settings that this server reads under BERT's keys.

    Raises:
        CheckpointError: If it cannot be read, or describes a model that this server does not compute.
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
        if type(value) is not int or value < 1:
            raise CheckpointError(f"config.json has {key(count)} {value!r:.80}; it must be a whole number from 1")
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
    _check_size(settings, architecture)


def _check_padding(settings: Mapping[str, Any]) -> None:
    padding, end = settings["pad_token_id"], min(settings["vocab_size"], settings["max_position_embeddings"] - 1)
    if type(padding) is not int or not 0 <= padding < end:
        raise CheckpointError(
            f"config.json has pad_token_id {padding!r:.80}; positions of a {settings['model_type']} count from the one "
            f"after it, so it must be a whole number from 0 to {end - 1}"
        )


def _check_size(settings: Mapping[str, Any], architecture: Architecture) -> None:
    if settings["num_hidden_layers"] > _MAX_LAYERS:
        raise CheckpointError(
            f"config.json has {architecture.key('num_hidden_layers')} {settings['num_hidden_layers']:.4g}, the most is "
            f"{_MAX_LAYERS}"
        )
    needed, there = 4 * _parameter_count(settings), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        largest = max(architecture.counts, key=lambda key: int(settings[key]))
        raise CheckpointError(
            f"the model that config.json describes takes {needed / 1e9:.3g} GB in float32, this machine has "
            f"{there / 1e9:.3g} GB; check {architecture.key(largest)} ({settings[largest]:.4g})"
        )


def _parameter_count(settings: Mapping[str, Any]) -> int:
    hidden, embedded = settings["hidden_size"], architecture_of(settings).embedding_size(settings)
    rows = settings["vocab_size"] + settings["max_position_embeddings"] + settings["type_vocab_size"]
    block = hidden * (4 * hidden + 2 * settings["intermediate_size"])
    return int(embedded * rows + settings["num_hidden_layers"] * block)


def expected_shapes(settings: Mapping[str, Any], *, pooler: bool) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every weight of a model, by its name in BertModel."""
    hidden, intermediate = settings["hidden_size"], settings["intermediate_size"]
    embedded = architecture_of(settings).embedding_size(settings)
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(prefix: str, size: int) -> None:
        shapes[f"{prefix}.LayerNorm.weight"] = shapes[f"{prefix}.LayerNorm.bias"] = (size,)

    def linear(name: str, out_size: int, in_size: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out_size, in_size), (out_size,)

    shapes["embeddings.word_embeddings.weight"] = settings["vocab_size"], embedded
    shapes["embeddings.position_embeddings.weight"] = settings["max_position_embeddings"], embedded
    if settings["type_vocab_size"]:
        shapes["embeddings.token_type_embeddings.weight"] = settings["type_vocab_size"], embedded
    norm("embeddings", embedded)
    if embedded != hidden:
        linear("embeddings_project", hidden, embedded)
    for index in range(settings["num_hidden_layers"]):
        prefix = f"encoder.layer.{index}"
        for part in ("query", "key", "value"):
            linear(f"{prefix}.attention.self.{part}", hidden, hidden)
        linear(f"{prefix}.attention.output.dense", hidden, hidden)
        norm(f"{prefix}.attention.output", hidden)
        linear(f"{prefix}.intermediate.dense", intermediate, hidden)
        linear(f"{prefix}.output.dense", hidden, intermediate)
        norm(f"{prefix}.output", hidden)
    if pooler:
        linear("pooler.dense", hidden, hidden)
    return shapes
