"""Attention probabilities: equal to transformers' eager attention, by every way to ask, and bounded."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from support import BOUND, Server, open_client, running
from support.oracle import Oracle

from layertap import Attentions, Embedding, InvalidArgumentError, TokenIds, cli

INPUTS: list[Any] = [
    "the bank of the river",
    ("a loan from the bank", "please"),
    ["tokenization", "", "embeddings"],
    "",
    TokenIds(input_ids=[101, 2293, 3000, 102, 0], attention_mask=[1, 1, 1, 1, 0]),
    TokenIds(input_ids=[101, 2293, 102], attention_mask=[0, 0, 0]),
    TokenIds(input_ids=[101, 2293, 102], attention_mask=[0, 1, 0], token_type_ids=[0, 1, 1]),
]


def _wanted(oracle: Oracle, item: Any) -> list[np.ndarray]:
    if isinstance(item, TokenIds):
        return oracle.attentions(item.input_ids, item.attention_mask, item.token_type_ids)
    encoded = oracle.ids(item)
    return oracle.attentions(encoded["input_ids"], None, encoded["token_type_ids"])


def _check(found: Attentions, oracle: Oracle, inputs: list[Any], bound: float = BOUND) -> None:
    assert len(found.token_counts) == len(inputs)
    for index, item in enumerate(inputs):
        wanted = _wanted(oracle, item)
        for layer in found.layers:
            own = found.ragged(layer)[index]
            chosen = wanted[layer][list(found.heads)]
            assert own.shape == chosen.shape and np.abs(own.astype(np.float32) - chosen).max() <= bound
            count = int(found.token_counts[index])
            np.testing.assert_array_equal(found[layer][index, :, :count, :count], own)
            assert not found[layer][index, :, count:].any() and not found[layer][index, :, :, count:].any()


def test_all_layers_and_heads_of_every_kind_of_text(real: Any, real_oracle: Oracle) -> None:
    embedding = real.embed(INPUTS, attentions="all", layers="all")
    assert embedding.attentions.layers == tuple(range(6)) and embedding.attentions.heads == tuple(range(12))
    _check(embedding.attentions, real_oracle, INPUTS)


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 1e-3), ("bfloat16", 5e-3)])
def test_chosen_layers_and_heads(real: Any, real_oracle: Oracle, dtype: str, bound: float) -> None:
    embedding = real.embed(INPUTS, attentions=[-1, 0, 5], attention_heads=[7, 2], dtype=dtype, pooling="cls")
    assert embedding.attentions.layers == (0, 5) and embedding.attentions.heads == (7, 2)
    assert embedding.attentions[-1].shape[1] == 2 and embedding.layers == ()
    _check(embedding.attentions, real_oracle, INPUTS, bound)


def test_a_stream_gives_the_bits_of_a_call(real: Any) -> None:
    texts = ["word " * n for n in (1, 5, 300, 3, 120)]
    call = real.embed(texts, attentions=[0, 3], attention_heads=1)
    bound = 0.0 if real.model_info().batch_invariant else BOUND
    for item, own in zip(real.embed_stream(texts, attentions=[0, 3], attention_heads=1), call, strict=True):
        for layer in (0, 3):
            np.testing.assert_allclose(item.embedding.attentions[layer], own.attentions[layer], atol=bound, rtol=0)


def test_beside_other_outputs_and_in_their_place_in_the_tuple(real: Any, real_oracle: Oracle) -> None:
    embedding = real.embed("the bank", attentions="all", pooler_output=True, layers="all", words="mean")
    assert isinstance(embedding, Embedding)
    only = real.embed("the bank", attentions="all")
    last, attentions = only.to_tuple()
    assert last.shape == (1, 4, 384) and len(attentions) == 6 and attentions[0].shape == (1, 12, 4, 4)
    *_, attentions = real.embed("the bank", attentions="all", pooler_output=True, layers="all").to_tuple()
    tensors = only.to_torch().attentions
    for layer in range(6):
        np.testing.assert_array_equal(tensors[layer].numpy(), attentions[layer])
        assert np.abs(tensors[layer].sum(-1).numpy() - 1).max() < 1e-5
    _check(pickle.loads(pickle.dumps(only)).attentions, real_oracle, ["the bank"])
    assert f"attentions={only.attentions!r}" in repr(only) and "heads" not in repr(embedding.hidden_states)
    table = only.to_arrow()
    assert len(table["attentions_3"][0]) == 16 and len(table["attentions_3"][0][0]) == 12


def test_a_text_asks_for_them_beside_others_that_do_not(real: Any, real_oracle: Oracle) -> None:
    plain = real.embed(["one", "two three"], layers="all")
    both = real.embed(["one", "two three"], layers="all", attentions=2)
    for layer in range(7):
        np.testing.assert_array_equal(plain.hidden_states[layer], both.hidden_states[layer])


def test_what_was_not_asked_for_is_named(real: Any) -> None:
    embedding = real.embed("x", attentions=[1])
    with pytest.raises(IndexError, match=r"layer 0 is not held \(held: 1\); ask for it with attentions=\[0\]"):
        embedding.attentions[0]
    with pytest.raises(LookupError, match="attentions were not requested"):
        _ = real.embed("x").attentions


@pytest.mark.parametrize("ending", ["npz", "parquet"])
def test_a_file_has_them(small_server: Server, real_oracle: Oracle, tmp_path: Path, ending: str) -> None:
    texts, out = ["I love Paris", "Hello"], tmp_path / f"out.{ending}"
    asked = ["--attentions", "0,5", "--attention-heads", "1,3", "-o", str(out)]
    assert cli.main(["embed", "--target", small_server.address, *asked, *texts, "--text"]) == 0
    counts = [5, 3]
    if ending == "npz":
        with np.load(out) as found:
            assert found["token_pair_counts"].tolist() == [25, 9]
            rows = np.split(found["attentions_5"], [25])
    else:
        rows = [np.array(cell) for cell in pyarrow.parquet.read_table(out)["attentions_5"].to_pylist()]
    for own, count, text in zip(rows, counts, texts, strict=True):
        wanted = _wanted(real_oracle, text)[5][[1, 3]].transpose(1, 2, 0).reshape(count * count, 2)
        assert np.abs(own - wanted).max() <= BOUND


@pytest.fixture(scope="module")
def small_server() -> Any:
    with running("--max-call-output-bytes", "16MiB", "--max-output-bytes", "64MiB") as server:
        yield server


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_text_too_long_for_its_attentions_is_refused_alone(kind: str, small_server: Server) -> None:
    long = "word " * 500
    with contextlib.closing(open_client(kind, small_server.address)) as client:
        with pytest.raises(InvalidArgumentError) as caught:
            client.embed(["x", long], attentions="all", pooling="mean")
        for part in ("inputs[1]", "attentions of 6 layers and 12 heads for 502 tokens", "ask for fewer"):
            assert part in str(caught.value)
        good, bad = client.embed_stream(["x", long], attentions="all", pooling="mean")
        assert good.embedding.attentions[0].shape == (1, 12, 3, 3)
        assert "502 tokens" in str(bad.error)
        assert client.embed(long, attentions=0, attention_heads=[0, 1]).attentions[0].shape == (1, 2, 502, 502)
