"""The answer to GetModelInfo: the model, the limits in force, and what the model's folder says about sentences."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import layertap
from layertap import wire
from layertap.types import Limits
from layertap.v1 import embedding_pb2 as pb
from layertap_server.model.facts import ModelFacts
from layertap_server.model.files import CheckpointError
from layertap_server.model.sentence_config import SentenceConfig


def info_of(
    model: ModelFacts,
    *,
    limits: Limits,
    devices: Sequence[str],
    dtype: str,
    sentence_config: SentenceConfig,
    batch_invariant: bool,
    process_count: int,
    process: int,
) -> bytes:
    """Returns the answer to GetModelInfo, serialized.

    Raises:
        CheckpointError: if it is larger than any answer may be, which only the folder's prompts can make it.
    """
    answer = pb.GetModelInfoResponse(
        model_id=model.model_id,
        fingerprint=model.fingerprint,
        model_type=model.model_type,
        layer_count=model.layer_count,
        hidden_size=model.hidden_size,
        attention_head_count=model.head_count,
        vocab_size=model.vocab_size,
        type_vocab_size=model.type_vocab_size,
        max_length=model.max_length,
        default_max_length=model.default_max_length,
        has_pooler_output=model.has_pooler_output,
        compute_dtype=wire.DTYPES[dtype],
        devices=devices,
        special_token_ids=model.special_token_ids,
        pad_token_id=model.pad_token_id,
        limits=pb.Limits(**dataclasses.asdict(limits)),
        server_version=layertap.__version__,
        sentence_config=_sentence_config(sentence_config, model),
        batch_invariant=batch_invariant,
        padding_side=wire.PADDING_SIDES[model.padding_side],
        special_tokens=model.special_tokens,
        has_token_type_ids=model.has_token_type_ids,
        process_count=process_count,
        process_number=process,
    ).SerializeToString()
    if len(answer) > limits.max_response_bytes:
        raise CheckpointError(
            f"the prompts of the model make an answer of {len(answer)} bytes, the most is {limits.max_response_bytes}; "
            "remove some from config_sentence_transformers.json, or raise --max-response-bytes"
        )
    return answer


def _sentence_config(config: SentenceConfig, model: ModelFacts) -> pb.SentenceConfig:
    return pb.SentenceConfig(
        unsupported=config.unsupported,
        strategies=[wire.POOLING_STRATEGIES[strategy.name.lower()] for strategy in config.strategies],
        normalize=config.normalize,
        dimensions=config.dimensions,
        max_length=config.max_length,
        truncation=wire.TRUNCATIONS[config.truncation],
        lower_case=config.lower_case,
        prompts=config.prompts,
        default_prompt_name=config.default_prompt_name,
        include_prompt=config.include_prompt,
        needs_sentence_modules=config.has_modules,
        vector_size=config.vector_size(model.hidden_size),
        token_size=config.token_size(model.hidden_size),
    )
