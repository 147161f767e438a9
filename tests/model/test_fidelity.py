"""Every layer, every token, over real sockets: equal to what transformers computes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import BASE_SETTINGS, BOUND, open_client, running, worst, write_settings
from support.oracle import POOLINGS, Oracle, dummy_oracle

from layertap import Embedding, Pooling, TokenIds

PARIS_IDS = [101, 1045, 2293, 3000, 102, 0, 0]
PARIS_MASK = [1, 1, 1, 1, 1, 0, 0]

PROSE = (
    "The quick brown fox jumps over the lazy dog, while tokenization-aware embeddings sleep in Paris. "
    "Résumé, naïve café: 東京 and Москва are cities; 3.14159 is a number, and :-) is a smile. "
)
CASES: dict[str, list[Any]] = {
    "one text": ["I love Paris"],
    "the empty text": [""],
    "ragged": ["a", "I love Paris", PROSE, "", "two words"],
    "equal lengths": ["I love Paris", "you love Rome", "we love Berlin"],
    "pairs": [("I love Paris", "so does she"), ("", "x"), (PROSE, "short")],
    "words": [["I", "love", "Paris"], ["tokenization", "", "embeddings"], ["x"]],
    "mixed kinds": ["I love Paris", ("a", "b"), ["c", "d"]],
    "as long as can be": ["paris " * 510],
}


@pytest.mark.parametrize("inputs", CASES.values(), ids=CASES.keys())
def test_every_layer_of_every_token_equals_transformers(real: Any, real_oracle: Oracle, inputs: list[Any]) -> None:
    found = real.embed(inputs, layers="all", pooler_output=True)
    _check(found, [real_oracle.text(item) for item in inputs])


def test_token_ids_are_computed_as_given_under_any_mask(real: Any, real_oracle: Oracle) -> None:
    random = np.random.default_rng(0)
    encoded = real_oracle.ids(PROSE)["input_ids"]
    given = [
        TokenIds([101]),
        TokenIds(PARIS_IDS, PARIS_MASK),
        TokenIds(PARIS_IDS, [0] * 7),
        TokenIds(PARIS_IDS, [0, 1, 0, 1, 0, 0, 1], [0, 0, 0, 1, 1, 1, 1]),
        TokenIds(encoded, random.integers(0, 2, len(encoded))),
        TokenIds(encoded),
        TokenIds(encoded[::-1], random.integers(0, 2, len(encoded)), random.integers(0, 2, len(encoded))),
    ]
    found = real.embed(given, layers="all", pooler_output=True)
    _check(found, [real_oracle.run(one.input_ids, one.attention_mask, one.token_type_ids) for one in given])
    for one, mask in zip(given, found.attention_mask, strict=True):
        wanted = [1] * len(one.input_ids) if one.attention_mask is None else list(one.attention_mask)
        assert mask[: len(wanted)].tolist() == wanted and not mask[len(wanted) :].any()


def test_a_text_comes_out_the_same_alone_and_in_company(real: Any) -> None:
    inputs = [item for case in CASES.values() for item in case]
    together = real.embed(inputs, layers="all", pooler_output=True, pooling="mean")
    for n, item in enumerate(inputs):
        alone = real.embed([item], layers="all", pooler_output=True, pooling="mean")
        for layer in alone.layers:
            assert worst(together.ragged(layer)[n], alone.ragged(layer)[0]) <= BOUND
        assert worst(together.pooler_output[n], alone.pooler_output[0]) <= BOUND
        assert worst(together.pooled[n], alone.pooled[0]) <= BOUND


def test_the_notebook_with_the_right_mask_and_with_the_inverted_one(real: Any, real_oracle: Oracle) -> None:
    tokens = real.tokenize("I love Paris", pad_to=7)
    assert tokens.tokens == [["[CLS]", "i", "love", "paris", "[SEP]", "[PAD]", "[PAD]"]]
    assert tokens.input_ids.tolist() == [PARIS_IDS]
    assert tokens.attention_mask.tolist() == [PARIS_MASK]
    assert tokens.token_counts.tolist() == [7]
    inverted = dataclasses.replace(tokens, attention_mask=1 - tokens.attention_mask)
    for given in (tokens, inverted):
        found = real.embed(given, layers="all", pooler_output=True)
        layers, pooler_output = real_oracle.run(PARIS_IDS, given.attention_mask[0])
        assert found.last_hidden_state.shape == (1, 7, 384)
        assert worst(found.last_hidden_state[0], layers[-1]) <= BOUND
        assert worst(found.pooler_output[0], pooler_output) <= BOUND
        assert len(found.hidden_states) == 7
        assert [state.shape for state in found.hidden_states] == [(1, 7, 384)] * 7
        assert found.attention_mask.tolist() == given.attention_mask.tolist()


def test_all_thirteen_hidden_states_of_a_bert_base_shape(tmp_path: Path, real_folder: Path, device: str) -> None:
    folder = write_settings(tmp_path / "base", BASE_SETTINGS)
    oracle = dummy_oracle(BASE_SETTINGS, 3, real_folder)
    flags = ("--model-id", str(folder), "--load-format", "dummy", "--seed", "3", "--device", device)
    with running(*flags) as server:
        for kind in ("sync", "async"):
            client = open_client(kind, server.address)
            tokens = client.tokenize("I love Paris", pad_to=7)
            found = client.embed(tokens, layers="all", pooler_output=True)
            client.close()
            assert [state.shape for state in found.hidden_states] == [(1, 7, 768)] * 13
            assert found.pooler_output.shape == (1, 768)
            _check(found, [oracle.run(PARIS_IDS, PARIS_MASK)])
            last, _, hidden_states = found.to_tuple()
            assert np.array_equal(last, hidden_states[12]) and len(hidden_states) == 13


@pytest.mark.parametrize("strategy", POOLINGS)
@pytest.mark.parametrize("special", [True, False], ids=["with specials", "without specials"])
def test_every_pooling_equals_its_definition(real: Any, real_oracle: Oracle, strategy: str, special: bool) -> None:
    if strategy == "cls" and not special:
        pytest.skip("refused; see test_wrong_arguments")
    masked = TokenIds(PARIS_IDS, [1, 1, 0, 1, 1, 0, 0])
    inputs = [PROSE, "I love Paris", masked, ("a pair", "of texts")]
    poolings = [
        Pooling(strategy, layer=layer, include_special_tokens=special, normalize=normalize, dimensions=dimensions)
        for layer, normalize, dimensions in ((-1, False, None), (2, True, None), (0, True, 5), (-3, False, 384))
    ]
    found = real.embed(inputs, pooling=poolings)
    assert len(found.pools) == 4 and found.layers == ()
    for n, item in enumerate(inputs):
        if item is masked:
            encoded = {"input_ids": PARIS_IDS, "attention_mask": [1, 1, 0, 1, 1, 0, 0], "token_type_ids": [0] * 7}
        else:
            encoded = real_oracle.ids(item)
        layers, _ = real_oracle.run(encoded["input_ids"], encoded["attention_mask"], encoded["token_type_ids"])
        taken = np.array(encoded["attention_mask"]) == 1
        if not special:
            taken &= ~np.isin(encoded["input_ids"], real_oracle.tokenizer.all_special_ids)
        for pool, pooling in zip(found.pools, poolings, strict=True):
            rows = layers[pooling.layer][taken]
            wanted = POOLINGS[strategy](layers[pooling.layer] if strategy == "cls" else rows)[: pooling.dimensions]
            if pooling.normalize:
                wanted = wanted / np.linalg.norm(wanted)
            assert worst(pool[n], wanted.astype(np.float32)) <= BOUND


def test_a_request_mixes_outputs_and_keeps_their_order(real: Any, real_oracle: Oracle) -> None:
    found = real.embed(
        ["I love Paris", "no"], layers=[-1, 2, 2, -7], pooling=["max", "cls"], pooler_output=True, return_tokens=True
    )
    assert found.layers == (0, 2, 6)
    assert [pool.shape for pool in found.pools] == [(2, 384), (2, 384)]
    layers, pooler_output = real_oracle.text("I love Paris")
    assert worst(found.pools[0][0], layers[6].max(0)) <= BOUND
    assert worst(found.pools[1][0], layers[6][0]) <= BOUND
    assert worst(found.ragged(0)[0], layers[0]) <= BOUND
    assert worst(found.hidden_states[2][0], layers[2]) <= BOUND
    assert worst(found.pooler_output[0], pooler_output) <= BOUND
    assert found.tokens.tokens == [["[CLS]", "i", "love", "paris", "[SEP]"], ["[CLS]", "no", "[SEP]"]]
    assert not found.hidden_states[2][1, 3:].any()


def test_half_precision_on_the_wire_is_the_rounded_answer(real: Any) -> None:
    whole = real.embed(PROSE, layers="all", pooling="mean")
    for dtype, kind, step in (("float16", np.float16, 2**-10), ("bfloat16", np.float32, 2**-7)):
        half = real.embed(PROSE, layers="all", pooling="mean", dtype=dtype)
        for layer in whole.layers:
            assert half.hidden_states[layer].dtype == kind
            found, wanted = half.hidden_states[layer].astype(np.float32), whole.hidden_states[layer]
            assert np.all(np.abs(found - wanted) <= step * np.abs(wanted) + 1e-4)
        assert half.pooled.dtype == kind
        if dtype == "bfloat16":
            assert not (half.pooled.view(np.uint32) & 0xFFFF).any()


def test_layers_stream_and_embed_agree(real: Any) -> None:
    inputs = [PROSE, "I love Paris", "", "paris " * 500]
    whole = real.embed(inputs, layers="all")
    came: dict[int, dict[int, np.ndarray]] = {}
    for part in real.embed_layers(inputs):
        for text, rows in zip(part.texts, part.rows, strict=True):
            assert text not in came.setdefault(part.layer, {})
            came[part.layer][text] = rows
    assert sorted(came) == list(whole.layers)
    for layer, texts in came.items():
        assert sorted(texts) == [0, 1, 2, 3]
        for text, rows in texts.items():
            assert worst(rows, whole.ragged(layer)[text]) <= BOUND
    streamed = list(real.embed_stream(inputs, layers="all"))
    assert [result.index for result in streamed] == [0, 1, 2, 3]
    for result in streamed:
        for layer in whole.layers:
            assert worst(result.embedding.ragged(layer)[0], whole.ragged(layer)[result.index]) <= BOUND


def _check(found: Embedding, wanted: list[tuple[list[np.ndarray], np.ndarray]]) -> None:
    assert found.layers == tuple(range(len(wanted[0][0])))
    assert found.token_counts.tolist() == [len(layers[0]) for layers, _ in wanted]
    for n, (layers, pooler_output) in enumerate(wanted):
        for layer, rows in enumerate(layers):
            assert worst(found.ragged(layer)[n], rows) <= BOUND, (n, layer)
            padded = found.hidden_states[layer][n]
            assert np.array_equal(padded[: len(rows)], found.ragged(layer)[n]) and not padded[len(rows) :].any()
        assert worst(found.pooler_output[n], pooler_output) <= BOUND, n
