"""The served model: what `Client.model_info` returns.

Frozen, slotted, picklable; no I/O, no protobuf.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from layertap import _repr
from layertap.types import Limits, PoolingName, SideName, TruncationName


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class SentenceConfig(_repr.Shown):
    """What the model's folder says about sentences: what `encode` does, as sentence-transformers does it.

    Attributes:
        poolings: The strategies that pool the last layer; several are joined in this order. Empty: the folder makes
            token rows and no vector.
        normalize: Whether the vector is then divided by its Euclidean length.
        truncate_dim: How many values are then kept; None: all.
        max_length: The most tokens of one text; longer ones are cut.
        truncation: The side that is cut, "right" or "left".
        lower_case: Whether texts are turned to lower case before tokenizing.
        prompts: What may stand before a text, by the name that `prompt_name` takes.
        default_prompt_name: The prompt of an `encode` that names none; None: none.
        include_prompt: Whether the tokens of a prompt are pooled.
        needs_sentence_modules: Whether the folder has Dense modules or modules of token rows, which the server applies
            for `encode`.
        vector_size: Values of a vector before it is cut; 0: the folder makes none.
        token_size: Values of a token row of `output_value="token_embeddings"`.
        unsupported: What layertap cannot do of what the model asks for, so that `encode` refuses; None: nothing.
    """

    poolings: tuple[PoolingName, ...]
    normalize: bool
    truncate_dim: int | None
    max_length: int
    truncation: TruncationName
    lower_case: bool
    prompts: Mapping[str, str]
    default_prompt_name: str | None
    include_prompt: bool
    needs_sentence_modules: bool
    vector_size: int
    token_size: int
    unsupported: str | None

    def _summary(self) -> list[tuple[str, str]]:
        """Returns how one vector is made, and the names of the prompts without their texts."""
        names = ("poolings", "normalize", "truncate_dim", "max_length", "lower_case", "unsupported")
        facts = ((name, repr(getattr(self, name))) for name in names)
        return [*facts, ("prompts", ",".join(self.prompts))]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ModelInfo(_repr.Shown):
    """The served model.

    Attributes:
        model_id: Its name.
        fingerprint: sha256 over weights, tokenizer, configuration and compute dtype, in hex.
        model_type: The architecture, such as "bert" or "xlm-roberta".
        layer_count: L; there are L + 1 layers, 0 to L.
        hidden_size: Values a token row has.
        attention_head_count: Heads of each attention.
        vocab_size: Ids are below this.
        type_vocab_size: Token types are below this. 0: the model has none, and those of token ids must be 0.
        max_length: The most tokens of one text, special tokens counted.
        default_max_length: The most tokens of one text where a call names no max_length.
        has_pooler_output: Whether the model has pooler weights.
        compute_dtype: What the server computes in: "float32", "float16" or "bfloat16".
        devices: Where it computes, such as ("cpu",).
        special_token_ids: Ids that the tokenizer adds to a text, and that of padding, ascending.
            Of token ids `include_special_tokens=False` leaves these out.
        pad_token_id: The id that padding uses.
        limits: The bounds in force.
        server_version: The version of the server.
        sentence_config: What the model's folder says about sentences.
        batch_invariant: Whether a text has the same bits alone and in any batch, on the same machine.
        padding_side: Where the tokenizer's own configuration pads; layertap always pads on the right.
        special_tokens: The ids of the tokens that the tokenizer's configuration names, such as "cls_token".
        has_token_type_ids: Whether the tokenizer tells the strings of a pair apart by token types.
        process_count: Processes of the server; each connection belongs to one of them. 0: the server does not say.
    """

    model_id: str
    fingerprint: str
    model_type: str
    layer_count: int
    hidden_size: int
    attention_head_count: int
    vocab_size: int
    type_vocab_size: int
    max_length: int
    default_max_length: int
    has_pooler_output: bool
    compute_dtype: str
    devices: tuple[str, ...]
    special_token_ids: tuple[int, ...]
    pad_token_id: int
    limits: Limits
    server_version: str
    sentence_config: SentenceConfig
    batch_invariant: bool
    padding_side: SideName
    special_tokens: Mapping[str, int]
    has_token_type_ids: bool
    process_count: int

    def flat(self) -> dict[str, str]:
        """Returns all facts as text; those of a part below its name, such as `limits.max_text_count`."""
        found: dict[str, str] = {}
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, dict):
                found |= {f"{name}.{part}": _text(own) for part, own in value.items()}
            else:
                found[name] = _text(value)
        return found

    def _summary(self) -> list[tuple[str, str]]:
        """Returns its name and shapes."""
        names = ("layer_count", "hidden_size", "max_length", "compute_dtype", "devices")
        facts = ((name, repr(getattr(self, name))) for name in ("model_id", *names))
        return [*facts, ("fingerprint", f"{self.fingerprint[:12]}…")]

    def _repr_html_(self) -> str:
        return _repr.table("ModelInfo", self.flat().items())


def _text(value: Any) -> str:
    """Returns a value of `flat`; of several, one after the other, with spaces between them."""
    if isinstance(value, Mapping):
        return " ".join(f"{name}={own!r}" for name, own in value.items())
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
