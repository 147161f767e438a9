"""The answer to GetModelInfo as a `ModelInfo`. Pure."""

from __future__ import annotations

import dataclasses
from typing import Any, Final, cast

from google.protobuf.message import Message

from layertap import wire
from layertap.model_info import ModelInfo, SentenceConfig
from layertap.types import Limits, PoolingName
from layertap.v1 import embedding_pb2 as pb

_STRATEGY_NAMES: Final[dict[int, PoolingName]] = {
    number: cast("PoolingName", name) for name, number in wire.POOLING_STRATEGIES.items()
}


def read_model_info(message: pb.GetModelInfoResponse) -> ModelInfo:
    """Reads what `model_info` requested."""
    facts = _fields(ModelInfo, message) | {
        "limits": Limits(**_fields(Limits, message.limits)),
        "padding_side": "left" if message.padding_side == pb.PADDING_SIDE_LEFT else "right",
        "special_tokens": dict(message.special_tokens),
        "devices": tuple(message.devices),
        "special_token_ids": tuple(message.special_token_ids),
        "compute_dtype": wire.DTYPE_NAMES.get(message.compute_dtype, "unknown"),
        "sentence_config": _sentence_config(message.sentence_config),
    }
    return ModelInfo(**facts)


def _fields(kind: type, message: Message) -> dict[str, Any]:
    """Returns the fields of a message that a dataclass has under the same names."""
    return {field.name: getattr(message, field.name) for field in dataclasses.fields(kind)}


def _sentence_config(config: pb.SentenceConfig) -> SentenceConfig:
    poolings = [_STRATEGY_NAMES.get(strategy) for strategy in config.strategies]
    unsupported: str | None = config.unsupported
    if not (poolings or config.needs_sentence_modules) or None in poolings:
        unsupported = unsupported or "the server does not tell, or not in words that this client knows"
    return SentenceConfig(
        poolings=tuple(pooling for pooling in poolings if pooling),
        normalize=config.normalize,
        truncate_dim=config.dimensions or None,
        max_length=config.max_length,
        truncation="left" if config.truncation == pb.TRUNCATION_LEFT else "right",
        lower_case=config.lower_case,
        prompts=dict(config.prompts),
        default_prompt_name=config.default_prompt_name or None,
        include_prompt=config.include_prompt,
        needs_sentence_modules=config.needs_sentence_modules,
        vector_size=config.vector_size,
        token_size=config.token_size,
        unsupported=unsupported or None,
    )
