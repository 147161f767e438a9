"""Which models are served: how each model_type maps onto the one encoder.

BERT's names are the names of this server, for settings and for weights; the other types are rows of a table that says
what they spell or count otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from layertap_server.model.files import CheckpointError

_COUNTS: Final = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)


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

MODEL_TYPES: Final = tuple(_ARCHITECTURES)
"""The model types that are served, in alphabetical order."""


def architecture_of(settings: Mapping[str, Any]) -> Architecture:
    """Returns the architecture that the settings of a model name.

    Raises:
        CheckpointError: if layertap does not serve it.
    """
    kind = settings.get("model_type")
    if isinstance(kind, str) and kind in _ARCHITECTURES:
        return _ARCHITECTURES[kind]
    raise CheckpointError(
        f"config.json says model_type {kind!r:.80}; layertap serves {', '.join(MODEL_TYPES)}, whose blocks are "
        "those of BERT; choose a checkpoint of one of these"
    )
