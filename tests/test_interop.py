"""Results as other libraries hold them, columns of theirs as texts, and how results look. No server, no sockets."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from layertap import (
    Embedding,
    HiddenStates,
    InvalidArgumentError,
    LayerRows,
    Limits,
    ModelInfo,
    ModelRef,
    StreamResult,
    Timings,
    TokenIds,
    Tokens,
)
from layertap.errors import DataLossError
from layertap.inputs import check_items, to_messages
from layertap.ledger import StreamLedger
from layertap.v1 import embedding_pb2 as pb

COUNTS = np.array([5, 3])
SIZE = 4
NASTY = "<script>alert('&')</script>"
MODEL = f"bert{NASTY}"


def numbers(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32).astype(dtype)


def tokens() -> Tokens:
    inside = np.arange(5) < COUNTS[:, None]
    ids = np.where(inside, [[101, 1045, 2293, 3000, 102], [101, 7592, 102, 0, 0]], 0)
    return Tokens(
        tokens=[["[CLS]", "i", "love", NASTY, "[SEP]"], ["[CLS]", "hello", "[SEP]"]],
        input_ids=ids,
        attention_mask=inside.astype(np.int64),
        token_type_ids=np.zeros((2, 5), np.int64),
        special_tokens_mask=1 - inside,
        word_ids=np.where(inside, np.arange(5) - 1, -1),
        offset_mapping=np.stack([np.arange(10).reshape(2, 5), np.arange(1, 11).reshape(2, 5)], 2),
        token_counts=COUNTS,
        truncated=np.array([False, True]),
    )


def embedding(
    *, layers: tuple[int, ...] = (), pools: int = 0, pooler: bool = False, dtype: str = "float32", **changes: Any
) -> Embedding:
    ragged = {layer: numbers(int(COUNTS.sum()), SIZE, dtype=dtype) + layer for layer in layers}
    made = Embedding(
        hidden_states=HiddenStates(ragged=ragged, token_counts=COUNTS, layer_count=6),
        pools=tuple(numbers(2, SIZE + n, dtype=dtype) for n in range(pools)),
        token_counts=COUNTS,
        truncated=np.array([False, True]),
        attention_mask=(np.arange(5) < COUNTS[:, None]).astype(np.int64),
        model=ModelRef(model_id=MODEL, fingerprint="f" * 64),
        timings=Timings(queue_time_ns=1, tokenize_time_ns=2, compute_time_ns=3),
        _pooler_output=numbers(2, SIZE, dtype=dtype) if pooler else None,
        _tokens=None,
    )
    return dataclasses.replace(made, **changes)


FULL = {"layers": (0, 5, 6), "pools": 2, "pooler": True}

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
    assert np.array(one, copy=False) is array(one)
    copied = np.array(one)
    assert np.array_equal(copied, array(one)) and not np.shares_memory(copied, array(one))
    assert np.asarray(one, np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="float64 takes a copy"):
        np.array(one, np.float64, copy=False)


@pytest.mark.parametrize(("one", "array"), SINGLE.values(), ids=SINGLE.keys())
def test_dlpack_hands_over_that_array_in_place(one: Embedding, array: Callable[[Embedding], np.ndarray]) -> None:
    for taken in (torch.from_dlpack(one).numpy(), np.from_dlpack(one)):
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
    for take in (np.asarray, torch.from_dlpack, np.from_dlpack):
        with pytest.raises(TypeError, match=f"holds {named}; take"):
            take(several)


def test_hidden_states_are_a_stack_of_layers() -> None:
    states = embedding(**FULL).hidden_states
    assert np.array_equal(np.asarray(states), np.stack(tuple(states)))
    assert np.asarray(states).shape == (3, 2, 5, SIZE) and np.asarray(states, np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="3 layers become one array by a copy"):
        np.array(states, copy=False)
    lone = embedding(layers=(2,)).hidden_states
    assert np.shares_memory(np.array(lone, copy=False), lone[2])


# Torch.


def test_tensors_share_memory_and_have_the_names_of_transformers() -> None:
    found = embedding(**FULL)
    made = found.to_torch()
    pairs = [
        (made.last_hidden_state, found.last_hidden_state),
        (made.pooler_output, found.pooler_output),
        (made.attention_mask, found.attention_mask),
        *zip(made.hidden_states, found.hidden_states, strict=True),
        *zip(found.hidden_states.to_torch(), found.hidden_states, strict=True),
        *zip(made.pools, found.pools, strict=True),
    ]
    assert len(pairs) == 11
    for tensor, array in pairs:
        assert np.array_equal(tensor.numpy(), array) and np.shares_memory(tensor.numpy(), array)
    bare = embedding(layers=(0,)).to_torch()
    assert bare.last_hidden_state is None and bare.pooler_output is None and bare.pools == ()


def test_the_tensor_of_a_read_only_array_is_a_copy() -> None:
    found = embedding(pools=1)
    found.pooled.flags.writeable = False
    (tensor,) = found.to_torch().pools
    tensor += 1
    assert np.allclose(tensor.numpy(), found.pooled + 1)


def test_what_shares_memory_keeps_it_alive() -> None:
    class Memory(np.ndarray):
        """An array that can be watched."""

    memory = np.zeros((2, SIZE), np.float32).view(Memory)
    gone = weakref.ref(memory)
    shared: Any = embedding(pools=(1), **{}).to_torch
    shared = dataclasses.replace(embedding(), pools=(memory,))
    kept: list[Any] = [shared.to_torch(), shared.to_arrow(), shared.to_pandas(), torch.from_dlpack(shared)]
    del memory, shared
    while kept:
        gc.collect()
        assert gone() is not None
        kept.pop()
    gc.collect()
    assert gone() is None


# Arrow.


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_table_has_one_row_a_text_and_shares_memory(dtype: str) -> None:
    found = embedding(**FULL, dtype=dtype, _tokens=tokens())
    table = found.to_arrow()
    assert table.column_names == [
        *("token_counts", "truncated", "layer_0", "layer_5", "layer_6"),
        *("pool_0", "pool_1", "pooler_output", "tokens"),
    ]
    assert table.num_rows == 2
    assert table.schema.metadata == {b"model_id": found.model.model_id.encode(), b"fingerprint": b"f" * 64}
    number = pa.from_numpy_dtype(np.dtype(dtype))
    assert table.schema.field("pool_1").type == pa.list_(number, SIZE + 1)
    assert table.schema.field("layer_5").type == pa.list_(pa.list_(number, SIZE))
    assert table["token_counts"].to_pylist() == [5, 3] and table["truncated"].to_pylist() == [False, True]
    assert table["tokens"].to_pylist() == tokens().tokens
    assert table["pool_0"].to_pylist() == found.pools[0].tolist()
    assert table["layer_5"].to_pylist() == [rows.tolist() for rows in found.ragged(5)]
    for name, array in (("pool_1", found.pools[1]), ("layer_5", found.ragged(5)[0])):
        values = table[name].chunk(0)
        while not isinstance(values, pa.lib.FloatingPointArray | pa.lib.NumericArray):
            values = values.values
        assert np.shares_memory(values.to_numpy(), array)


def test_any_library_takes_the_tables_by_arrows_own_interface() -> None:
    assert pa.table(embedding(**FULL)).equals(embedding(**FULL).to_arrow())
    assert pa.table(tokens()).equals(tokens().to_arrow())


# pandas.


def test_a_frame_has_one_row_a_text_and_cells_are_views() -> None:
    found = embedding(**FULL, _tokens=tokens())
    frame = found.to_pandas()
    assert list(frame.columns) == found.to_arrow().column_names and len(frame) == 2
    assert frame.token_counts.tolist() == [5, 3] and frame.truncated.tolist() == [False, True]
    assert frame.tokens.tolist() == tokens().tokens
    for n in range(2):
        assert np.shares_memory(frame.pool_1[n], found.pools[1]) and np.array_equal(frame.pool_1[n], found.pools[1][n])
        assert np.shares_memory(frame.layer_5[n], found.ragged(5)[n])
        assert np.array_equal(frame.layer_5[n], found.ragged(5)[n])


def test_tokens_are_a_frame_and_a_table_with_one_row_a_token() -> None:
    frame = tokens().to_pandas()
    assert list(frame.columns) == [
        *("text", "tokens", "input_ids", "attention_mask", "token_type_ids"),
        *("special_tokens_mask", "word_ids", "start", "end"),
    ]
    assert frame.text.tolist() == [0] * 5 + [1] * 3
    assert frame.tokens.tolist() == list(itertools.chain(*tokens().tokens))
    assert frame.input_ids.tolist() == [101, 1045, 2293, 3000, 102, 101, 7592, 102]
    assert frame.start.tolist() == [0, 1, 2, 3, 4, 5, 6, 7] and frame.end.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    table = tokens().to_arrow()
    assert {name: column.tolist() for name, column in frame.items()} == table.to_pydict()


# What is missing.


@pytest.mark.parametrize(
    ("module", "extra", "use"),
    [
        ("torch", "torch", lambda: embedding(pools=1).to_torch()),
        ("pyarrow", "arrow", lambda: embedding(pools=1).to_arrow()),
        ("pyarrow", "arrow", lambda: tokens().to_arrow()),
        ("pandas", "pandas", lambda: embedding(pools=1).to_pandas()),
        ("pandas", "pandas", lambda: tokens().to_pandas()),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, module: str, extra: str, use: Callable[[], object]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"to_\w+\(\) needs {module}; .*layertap\[{extra}\]") as caught:
        use()
    assert caught.value.name == module


# Columns as texts.

TEXTS = ["one", "", "three"]
COLUMNS: dict[str, Callable[[list[Any]], Any]] = {
    "a list": list,
    "an array of str": np.array,
    "an array of objects": lambda items: np.array(items, object),
    "a Series": pd.Series,
    "a Series with another index": lambda items: pd.Series(items, index=range(7, 7 + len(items))),
    "a Series of objects": lambda items: pd.Series(items, dtype=object),
    "a categorical Series": lambda items: pd.Series(items, dtype="category"),
    "an Arrow array": lambda items: pa.array(items, pa.string()),
    "a large Arrow array": lambda items: pa.array(items, pa.large_string()),
    "a chunked Arrow array": lambda items: pa.chunked_array([items[:1], items[1:]], pa.string()),
    "a dictionary-encoded Arrow array": lambda items: pa.array(items, pa.string()).dictionary_encode(),
}
MISSING = [
    (name, missing)
    for name in COLUMNS
    for missing in ([None] if "Arrow" in name else [None, float("nan"), pd.NA, pd.NaT, np.float64("nan")])
    if name != "an array of str"
]


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_is_as_good_as_a_list(name: str) -> None:
    column = COLUMNS[name](TEXTS)
    assert to_messages(column) == [pb.Input(text=text) for text in TEXTS]
    check_items(column)


def test_an_arrow_column_of_lists_has_words_or_ids() -> None:
    assert to_messages(pa.array([["a", "b"]])) == [pb.Input(words=pb.Words(words=["a", "b"]))]
    assert to_messages(pa.array([[101, 102]])) == [pb.Input(token_ids=pb.TokenIds(input_ids=[101, 102]))]


@pytest.mark.parametrize(("name", "missing"), MISSING, ids=str)
def test_a_missing_text_is_refused_by_its_number(name: str, missing: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r'^inputs\[1\] is missing \(None or NaN\); .* pass "" for'):
        to_messages(COLUMNS[name](["one", missing, "three"]))


def test_in_a_stream_a_missing_text_is_a_result() -> None:
    ledger = StreamLedger(pb.EmbedOptions(), ordered=False)
    for item in pa.array(["one", None]):
        ledger.offer(item)
    (result,) = ledger.ready()
    assert result.index == 1 and "inputs[1] is missing" in str(result.error)


TABLES = {
    "a frame": pd.DataFrame({"text": TEXTS}),
    "a table": pa.table({"text": TEXTS}),
    "a record batch": pa.record_batch({"text": TEXTS}),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
def test_a_table_is_refused_since_its_texts_are_a_column(table: Any) -> None:
    for take in (to_messages, check_items):
        with pytest.raises(InvalidArgumentError, match=r"of type \w+; pass one of its columns"):
            take(table)


def test_a_mask_may_be_of_booleans() -> None:
    (message,) = to_messages(TokenIds([101, 102, 0], np.array([True, True, False])))
    assert message.token_ids.attention_mask == [1, 1, 0]


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
    has_pooler_output=True,
    compute_dtype="float32",
    devices=("cpu",),
    special_token_ids=(0, 100, 101, 102, 103),
    pad_token_id=0,
    limits=Limits(**{field.name: 1 for field in dataclasses.fields(Limits)}),
    server_version="1",
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


@pytest.mark.parametrize(("result", "wanted"), LOOKS.values(), ids=LOOKS.keys())
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
