"""What a model's folder says about sentences: read as sentence-transformers does, or named as what cannot be done."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from support.sentence_folders import (
    MODULE,
    NORMALIZE,
    POOLING,
    TRANSFORMER,
    modules,
    read,
    write,
)

from layertap_server.model import sentence_config as sentences
from layertap_server.model import sentence_modules
from layertap_server.types import Strategy


def test_without_modules_nothing_else_is_read(tmp_path: Path) -> None:
    write(
        tmp_path,
        sentence_bert_config={"max_seq_length": 9},
        config_sentence_transformers={"prompts": {"query": "q: "}},
        _1_Pooling__config={"pooling_mode": "cls"},
    )
    assert read(tmp_path) == sentences.SentenceConfig(max_length=512)


@pytest.mark.parametrize(
    ("pooling", "strategies"),
    [
        ({}, (Strategy.MEAN,)),
        ({"pooling_mode": "lasttoken"}, (Strategy.LAST,)),
        ({"pooling_mode": ["mean", "cls"]}, (Strategy.MEAN, Strategy.CLS)),
        ({"pooling_mode": "max", "pooling_mode_mean_tokens": True}, (Strategy.MAX,)),
        ({"pooling_mode_mean_tokens": False}, (Strategy.MEAN,)),
        ({"pooling_mode_lasttoken": True, "pooling_mode_max_tokens": True}, (Strategy.MAX, Strategy.LAST)),
    ],
)
def test_poolings_by_name_and_by_flag(tmp_path: Path, pooling: Any, strategies: tuple[Strategy, ...]) -> None:
    write(tmp_path, modules=modules(TRANSFORMER, POOLING), _1_Pooling__config=pooling)
    found = read(tmp_path)
    assert (found.strategies, found.unsupported) == (strategies, "")


def test_numbers_of_the_configurations_are_read_from_their_least(tmp_path: Path) -> None:
    write(
        tmp_path,
        modules=modules(TRANSFORMER, POOLING),
        sentence_bert_config={"max_seq_length": 2},
        config_sentence_transformers={"truncate_dim": 1},
    )
    found = read(tmp_path)
    assert (found.max_length, found.dimensions, found.unsupported) == (2, 1, "")


UNSUPPORTED = {
    "Dense": {"modules": modules(TRANSFORMER, POOLING, {"path": "2", "type": MODULE + "Dense"})},
    "custom.Thing": {"modules": modules(TRANSFORMER, {"path": "1", "type": "custom.Thing"})},
    "no Pooling": {"modules": modules(TRANSFORMER)},
    "module Normalize: 2_Normalize/config.json works on the vector before there is one": {
        "modules": modules(TRANSFORMER, NORMALIZE, POOLING)
    },
    "no module Transformer at place 0": {"modules": modules(TRANSFORMER | {"path": "0_BERT"}, POOLING)},
    "not the model's own": {"modules": modules(TRANSFORMER, POOLING | {"path": "../1_Pooling"})},
    "names a folder that": {"modules": modules(TRANSFORMER, POOLING | {"path": "1_\0Pooling"})},
    "modules.json cannot be read": {"modules": {"no": "list"}},
    "weightedmean": {"_1_Pooling__config": {"pooling_mode_weightedmean_tokens": True}},
    "on token rows after they are pooled": {"_2_Normalize__config": {"module_input_name": "token_embeddings"}},
    "sets processing_kwargs": {"sentence_bert_config": {"processing_kwargs": {"text": {"max_length": 5}}}},
    "sets transformer_task": {"sentence_bert_config": {"transformer_task": "fill-mask"}},
    "max_seq_length": {"sentence_bert_config": {"max_seq_length": "256"}},
    "model_type SparseEncoder": {"config_sentence_transformers": {"model_type": "SparseEncoder"}},
    "default_prompt_name": {"config_sentence_transformers": {"default_prompt_name": "nobody"}},
    "no strings": {"config_sentence_transformers": {"prompts": {"query": 5}}},
    "truncate_dim": {"config_sentence_transformers": {"truncate_dim": 0}},
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_what_cannot_be_done_is_named(tmp_path: Path, reason: str) -> None:
    write(tmp_path, **{"modules": modules(TRANSFORMER, POOLING, NORMALIZE)} | UNSUPPORTED[reason])
    assert reason in read(tmp_path).unsupported
    (tmp_path / "modules.json").write_bytes(b"\xff")
    assert "modules.json cannot be read" in read(tmp_path).unsupported


def test_what_a_folder_calls_its_modules_makes_no_endless_error(tmp_path: Path) -> None:
    write(tmp_path, modules=modules(TRANSFORMER, {"path": "1", "type": "a\nb" * 1000}))
    found = read(tmp_path).unsupported
    assert len(found) < 1100 and found.isprintable()


def test_all_that_a_folder_says_is_in_the_fingerprint_and_no_reason_is() -> None:
    one = sentences.SentenceConfig(max_length=256)
    changed = {
        "max_length": 128,
        "truncation": "left",
        "strategies": (Strategy.CLS,),
        "normalize": True,
        "dimensions": 5,
        "lower_case": True,
        "prompts": {"query": "q: "},
        "default_prompt_name": "query",
        "include_prompt": False,
        "token_modules": (sentence_modules.Normalize(of_tokens=True),),
        "vector_modules": (
            sentence_modules.Dense(
                of_tokens=False,
                in_size=32,
                out_size=4,
                has_bias=True,
                activation="Tanh",
                has_residual=False,
                weights=Path("x"),
                digest="0",
            ),
        ),
    }
    assert {field.name for field in dataclasses.fields(one)} == {*changed, "unsupported"}
    others = [dataclasses.replace(one, **{name: value}).description for name, value in changed.items()]
    assert len({one.description, *others}) == len(changed) + 1
    assert dataclasses.replace(one, unsupported="a reason").description == one.description
