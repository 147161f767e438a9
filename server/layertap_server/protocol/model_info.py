"""What GetModelInfo tells: the model, the limits in force, and how the model's folder would have sentences encoded."""

from __future__ import annotations

from collections.abc import Sequence

import layertap
from layertap import wire
from layertap.v1 import embedding_pb2 as pb
from layertap_server.config import Config
from layertap_server.model.facts import ModelFacts
from layertap_server.model.sentence_config import SentenceConfig


def info_of(
    config: Config,
    model: ModelFacts,
    devices: Sequence[str],
    sentence_config: SentenceConfig,
) -> pb.GetModelInfoResponse:
    """Returns the answer to GetModelInfo."""
    return pb.GetModelInfoResponse(
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
        compute_dtype=wire.DTYPES[config.dtype],
        devices=devices,
        special_token_ids=model.special_token_ids,
        pad_token_id=model.pad_token_id,
        limits=pb.Limits(
            max_text_count=config.max_text_count,
            max_character_count=config.max_character_count,
            max_request_bytes=config.max_request_bytes,
            max_response_bytes=config.max_response_bytes,
            max_frame_bytes=config.max_frame_bytes,
            max_queue_text_count=config.max_queue_text_count,
            max_queue_token_count=config.max_queue_token_count,
            max_output_bytes=config.max_output_bytes,
            max_concurrent_call_count=config.max_concurrent_call_count,
            max_call_output_bytes=config.max_call_output_bytes,
            max_queue_bytes=config.max_queue_bytes,
            stall_time_ns=int(config.stall_timeout_s * 1e9),
            grace_time_ns=int(config.grace_s * 1e9),
            max_connection_age_ns=int(config.max_connection_age_s * 1e9),
        ),
        server_version=layertap.__version__,
        sentence_config=_sentence_config(sentence_config),
    )


def _sentence_config(config: SentenceConfig) -> pb.SentenceConfig:
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
    )
