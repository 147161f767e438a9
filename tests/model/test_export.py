"""Results as other libraries hold them, and columns of theirs as texts. No server, no sockets."""

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
from support.results import FULL, SIZE, embedding, tokens
from support.streams import OneConnection

from layertap import InvalidArgumentError, TokenIds
from layertap._protocol.inputs import check_items, to_messages
from layertap.v1 import embedding_pb2 as pb

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


def test_torch_takes_an_embedding_with_one_output_by_dlpack() -> None:
    one = embedding(pools=1)
    taken = torch.from_dlpack(one).numpy()
    assert np.array_equal(taken, one.pooled) and np.shares_memory(taken, one.pooled)
    with pytest.raises(TypeError, match="holds pool_0, pool_1; take"):
        torch.from_dlpack(embedding(pools=2))


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
    ledger = OneConnection(pb.EmbedOptions(), ordered=False)
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
