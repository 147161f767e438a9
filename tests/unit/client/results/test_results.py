"""Results by themselves: the one array that some of them are, and how they look. No server, no sockets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.results import FULL, MODEL, NASTY, SIZE, embedding, numbers, tokens

from layertap import (
    Embedding,
    LayerRows,
    Limits,
    MixedRows,
    ModelInfo,
    SentenceConfig,
    StreamResult,
    Timings,
    TokenIds,
    Tokens,
)
from layertap.errors import DataLossError

# One array.

SINGLE: dict[str, tuple[Embedding, Callable[[Embedding], np.ndarray]]] = {
    "one pooling": (embedding(pools=1), lambda one: one.pooled),
    "the pooler output": (embedding(pooler=True), lambda one: one.pooler_output),
    "one layer": (embedding(layers=(6,)), lambda one: one.last_hidden_state),
    "float16": (embedding(pools=1, dtype="float16"), lambda one: one.pooled),
}


@pytest.mark.parametrize(("one", "array"), SINGLE.values(), ids=SINGLE.keys())
def test_an_embedding_with_one_output_is_that_array(one: Embedding, array: Callable[[Embedding], np.ndarray]) -> None:
    assert np.asarray(one) is array(one)
    assert one.__array__(copy=False) is array(one)
    copied = np.array(one)
    assert np.array_equal(copied, array(one)) and not np.shares_memory(copied, array(one))
    assert np.asarray(one, np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="float64 takes a copy"):
        one.__array__(np.float64, copy=False)


@pytest.mark.parametrize(("one", "array"), SINGLE.values(), ids=SINGLE.keys())
def test_dlpack_hands_over_that_array_in_place(one: Embedding, array: Callable[[Embedding], np.ndarray]) -> None:
    taken = np.from_dlpack(one)
    assert np.array_equal(taken, array(one)) and np.shares_memory(taken, array(one))


@pytest.mark.parametrize(
    ("several", "named"),
    [
        (embedding(pools=2), "pool_0, pool_1"),
        (embedding(**FULL), "layer 0, layer 5, layer 6, pool_0, pool_1, pooler_output"),
        (embedding(), "no array"),
    ],
)
def test_an_embedding_with_several_outputs_is_not_one_array(several: Embedding, named: str) -> None:
    for take in (np.asarray, np.from_dlpack):
        with pytest.raises(TypeError, match=f"holds {named}; take"):
            take(several)


def test_hidden_states_are_a_stack_of_layers() -> None:
    states = embedding(**FULL).hidden_states
    assert np.array_equal(np.asarray(states), np.stack(tuple(states)))
    assert np.asarray(states).shape == (3, 2, 5, SIZE) and np.asarray(states, np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="3 layers become one array by a copy"):
        states.__array__(copy=False)
    lone = embedding(layers=(2,)).hidden_states
    assert np.shares_memory(lone.__array__(copy=False), lone[2])


# Looks.

INFO = ModelInfo(
    model_id=NASTY,
    fingerprint="f" * 64,
    model_type="bert",
    layer_count=6,
    hidden_size=384,
    attention_head_count=12,
    vocab_size=30522,
    type_vocab_size=2,
    max_length=512,
    default_max_length=512,
    has_pooler_output=True,
    compute_dtype="float32",
    devices=("cpu",),
    special_token_ids=(0, 100, 101, 102, 103),
    pad_token_id=0,
    limits=Limits(**{field.name: 1 for field in dataclasses.fields(Limits)}),
    server_version="1",
    batch_invariant=True,
    padding_side="right",
    special_tokens={"cls_token": 101},
    has_token_type_ids=True,
    process_count=1,
    sentence_config=SentenceConfig(
        poolings=("mean",),
        normalize=True,
        truncate_dim=None,
        max_length=256,
        truncation="right",
        lower_case=False,
        prompts={"query": NASTY},
        default_prompt_name=None,
        include_prompt=True,
        needs_sentence_modules=False,
        vector_size=384,
        token_size=384,
        unsupported=None,
    ),
)
ERROR = DataLossError(NASTY)
LOOKS: dict[str, tuple[Any, str]] = {
    "embedding": (
        embedding(**FULL),
        "Embedding(text_count=2, layers=0,5,6, each=float32 [2, 5, 4], pool_0=float32 [2, 4], "
        f"pool_1=float32 [2, 5], pooler_output=float32 [2, 4], model={MODEL!r})",
    ),
    "pools": (embedding(pools=1), f"Embedding(text_count=2, pool_0=float32 [2, 4], model={MODEL!r})"),
    "hidden states": (embedding(layers=(0, 1, 2)).hidden_states, "HiddenStates(layers=0…2, each=float32 [2, 5, 4])"),
    "no hidden states": (embedding().hidden_states, "HiddenStates()"),
    "rows of their own": (
        embedding(_mixed=MixedRows(layers=(1, 2), _states=embedding(layers=(2,)).hidden_states)),
        f"Embedding(text_count=2, mixed=MixedRows(layers=1,2, each=float32 [2, 5, 4]), model={MODEL!r})",
    ),
    "tokens": (tokens(), f"""Tokens(text_count=2, length=5, tokens="[CLS] i love {NASTY} [SEP]")"""),
    "rows": (
        LayerRows(layer=3, texts=range(2), rows=embedding(layers=(3,)).ragged(3)),
        "LayerRows(layer=3, texts=range(0, 2), rows=[5, 4] [3, 4])",
    ),
    "a result": (
        StreamResult(index=7, error=None, _embedding=embedding(pools=1)),
        f"StreamResult(index=7, embedding=Embedding(text_count=2, pool_0=float32 [2, 4], model={MODEL!r}))",
    ),
    "a failure": (
        StreamResult(index=7, error=ERROR, _embedding=None),
        f"StreamResult(index=7, error={ERROR!r})",
    ),
    "few ids": (TokenIds([101, 102]), "TokenIds(input_ids=[101, 102], attention_mask=None, token_type_ids=None)"),
    "many ids": (
        TokenIds(np.ones((9, 9), np.int64), np.ones((9, 9), np.int32), [[1], [1, 2]]),
        "TokenIds(input_ids=int64 [9, 9], attention_mask=int32 [9, 9], token_type_ids=lists of different lengths)",
    ),
    "a model": (INFO, ""),
}
SMALL: dict[str, tuple[Any, str]] = {
    "times": (
        Timings(queue_time_ns=1_234_567, tokenize_time_ns=0, compute_time_ns=20_000_000),
        "Timings(queue=1.23 ms, tokenize=0 ms, compute=20 ms)",
    ),
    "limits": (
        INFO.limits,
        "Limits(max_text_count=1, max_character_count=1, max_request_bytes=1, max_response_bytes=1)",
    ),
    "sentences": (
        INFO.sentence_config,
        "SentenceConfig(poolings=('mean',), normalize=True, truncate_dim=None, max_length=256, lower_case=False, "
        "unsupported=None, prompts=query)",
    ),
}


@pytest.mark.parametrize(("result", "wanted"), [*LOOKS.values(), *SMALL.values()], ids=[*LOOKS, *SMALL])
def test_a_result_shows_what_it_is_and_no_numbers(result: Any, wanted: str) -> None:
    shown = repr(result)
    assert shown == wanted or not wanted
    assert "\n" not in shown and "array(" not in shown


@pytest.mark.parametrize("name", [name for name in LOOKS if "ids" not in name])
def test_a_notebook_shows_a_small_table_that_is_escaped(name: str) -> None:
    html = LOOKS[name][0]._repr_html_()
    assert html.startswith("<table>") and html.endswith("</table>") and "<script" not in html
    assert ("&lt;script&gt;" in html) == (NASTY in repr(LOOKS[name][0]))
    assert len(html) < 10_000


def test_the_tokens_of_an_embedding_are_shown_with_it() -> None:
    html = embedding(pools=1, _tokens=tokens())._repr_html_()
    assert ">love<" in html and ">2293<" in html and ">pool_0<" in html


def test_of_much_little_is_shown() -> None:
    count = 1000
    counts = np.full(count, 500)
    ids = np.zeros((count, 500), np.int64)
    flags = np.zeros(count, np.bool_)
    many = Tokens(
        tokens=[["token"] * 500] * count,
        **dict.fromkeys(("input_ids", "attention_mask", "token_type_ids", "special_tokens_mask", "word_ids"), ids),
        offset_mapping=np.zeros((count, 500, 2), np.int64),
        token_counts=counts,
        truncated=flags,
    )
    assert len(repr(many)) < 300 and len(many._repr_html_()) < 10_000
    assert "… 997 more" in many._repr_html_() and "…" in repr(many)
    rows = LayerRows(layer=0, texts=range(count), rows=[numbers(2, 2)] * count)
    assert len(repr(rows)) < 300 and len(rows._repr_html_()) < 1000


def test_showing_pads_nothing() -> None:
    states = embedding(layers=(0, 1)).hidden_states
    repr(states), states._repr_html_()
    assert not states._padded


def test_a_representation_has_no_control_characters_of_a_server() -> None:
    info = dataclasses.replace(INFO, model_id="a\x1b[2J", fingerprint="\x1b[31m" * 20)
    assert repr(info).isprintable()
