"""Every model type on a real server: all outputs equal those of transformers and sentence-transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from support import BOUND, family, worst
from support.in_process import serving
from support.oracle import POOLINGS, Oracle, WordsReference

from layertap import Client, Embedding, FailedPreconditionError, InvalidArgumentError, TokenIds
from layertap_server import cli

INPUTS: list[Any] = [
    "I love Paris",
    "",
    " two  spaces, and Ünïcode 東京 🙂",
    "a <pad> [PAD] <mask> [MASK] and </s> [SEP] in the text",
    ("a pair", "of <pad> two texts, the second is longer"),
    ("", "only a second"),
    ["words", "", "split", "before,", "東京x"],
]
LONG: list[Any] = [
    "The quick brown fox jumps over the lazy dog. " * 9,
    ("I love Paris, " * 12, "and so does she " * 20),
    ["tokenization", "of", "words"] * 30,
]
CUT = 21


@pytest.fixture(scope="module", params=[kind for kind in family.TOKENIZERS if kind != "bert"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each type, saved by sentence-transformers; bert is what all other tests serve."""
    made = family.save(request.param, tmp_path_factory.mktemp("plain") / request.param)
    modules = [Transformer(str(made)), Pooling(32, pooling_mode="mean"), Normalize()]
    saved = tmp_path_factory.mktemp("models") / request.param
    SentenceTransformer(modules=modules, device="cpu").save(str(saved))
    return saved


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle.load(folder)


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with serving(folder) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Client]:
    with Client(address) as opened:
        yield opened


def embed(client: Client, inputs: list[Any], **options: Any) -> Embedding:
    """Embeds with every layer, and the pooler output where there is one."""
    return client.embed(inputs, layers="all", pooler_output=client.model_info().has_pooler_output, **options)


def check(client: Client, found: Embedding, wanted: list[tuple[list[np.ndarray], Any]]) -> None:
    for n, (layers, pooler_output) in enumerate(wanted):
        for layer, rows in enumerate(layers):
            assert worst(found.ragged(layer)[n], rows) <= BOUND, (n, layer)
        assert (pooler_output is None) == (not client.model_info().has_pooler_output)
        if pooler_output is not None:
            assert worst(found.pooler_output[n], pooler_output) <= BOUND, n


def test_every_layer_and_the_pooler_equal_transformers(client: Client, oracle: Oracle) -> None:
    check(client, embed(client, INPUTS), [oracle.text(item) for item in INPUTS])


def test_tokens_are_those_of_transformers(client: Client, oracle: Oracle) -> None:
    tokens = client.tokenize(INPUTS)
    for n, item in enumerate(INPUTS):
        parts = item if isinstance(item, tuple) else (item,)
        options = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
        wanted = oracle.tokenizer(*parts, is_split_into_words=isinstance(item, list), **options)
        count = tokens.token_counts[n]
        assert tokens.tokens[n] == wanted.tokens()
        for name in ("input_ids", "special_tokens_mask", "attention_mask"):
            assert getattr(tokens, name)[n, :count].tolist() == wanted[name], name
        assert tokens.token_type_ids[n, :count].tolist() == wanted.get("token_type_ids", [0] * count)
        assert tokens.offset_mapping[n, :count].tolist() == [list(span) for span in wanted["offset_mapping"]]
        assert tokens.word_ids[n, :count].tolist() == [-1 if word is None else word for word in wanted.word_ids()]
        for skip in (False, True):
            decoded = client.decode([wanted["input_ids"]], skip_special_tokens=skip)
            assert decoded == oracle.tokenizer.batch_decode([wanted["input_ids"]], skip_special_tokens=skip)
    padded = client.tokenize("I love Paris", pad_to=12)
    wanted = oracle.tokenizer("I love Paris", padding="max_length", max_length=12)
    assert padded.input_ids[0].tolist() == wanted["input_ids"] and padded.tokens[0] == wanted.tokens()
    check(client, embed(client, padded), [oracle.run(wanted["input_ids"], wanted["attention_mask"])])


def test_token_ids_are_computed_as_given(client: Client, oracle: Oracle) -> None:
    """Padding inside, before and after the tokens has the position that transformers gives it, under any mask."""
    random = np.random.default_rng(0)
    info = client.model_info()
    ids = [int(one) for one in random.integers(0, info.vocab_size, 20)]
    pad = info.pad_token_id
    given = [
        TokenIds(ids),
        TokenIds([pad, *ids[:5], pad, pad, *ids[5:9], pad], [0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0]),
        TokenIds([pad, pad, pad], [0, 0, 0]),
        TokenIds([pad]),
        TokenIds(ids, random.integers(0, 2, 20)),
        TokenIds(random.integers(0, info.vocab_size, info.max_length)),
    ]
    if info.type_vocab_size:
        given.append(TokenIds(ids, None, random.integers(0, info.type_vocab_size, 20)))
    found = embed(client, given)
    check(client, found, [oracle.run(one.input_ids, one.attention_mask, one.token_type_ids) for one in given])


def test_attentions_equal_those_of_transformers(client: Client, oracle: Oracle) -> None:
    masked = TokenIds([5, 6, 7, 8, 9, 10], [1, 0, 1, 1, 0, 1])
    found = client.embed([*INPUTS, masked], attentions="all").attentions
    encoded = [oracle.ids(item) for item in INPUTS]
    wanted = [oracle.attentions(one["input_ids"], None, one.get("token_type_ids")) for one in encoded]
    wanted.append(oracle.attentions(masked.input_ids, masked.attention_mask))
    for n, layers in enumerate(wanted):
        for layer, probabilities in enumerate(layers):
            assert worst(found.ragged(layer)[n], probabilities) <= BOUND, (n, layer)


@pytest.mark.parametrize("side", ["right", "left"])
def test_long_texts_are_cut_as_transformers_cuts(client: Client, oracle: Oracle, side: Any) -> None:
    found = embed(client, LONG, truncation=side, max_length=CUT, return_tokens=True)
    oracle.tokenizer.truncation_side = side
    wanted = [
        oracle.tokenizer(
            *(item if isinstance(item, tuple) else (item,)),
            is_split_into_words=isinstance(item, list),
            truncation="longest_first",
            max_length=CUT,
        )
        for item in LONG
    ]
    oracle.tokenizer.truncation_side = "right"
    assert found.truncated.all()
    assert [found.tokens.tokens[n] for n in range(len(LONG))] == [one.tokens() for one in wanted]
    check(client, found, [oracle.run(one["input_ids"], None, one.get("token_type_ids")) for one in wanted])


@pytest.mark.parametrize("way", ["mean", "first_last"])
def test_words_equal_what_is_made_by_hand(client: Client, oracle: Oracle, way: Any) -> None:
    words = client.embed(INPUTS, words=way, layers=[0, -1]).words
    for n, item in enumerate(INPUTS):
        wanted = WordsReference(oracle, item)
        assert words.piece_counts[n].tolist() == list(map(len, wanted.pieces))
        assert words.offsets[n].tolist() == wanted.offsets
        for layer in (0, -1):
            assert worst(words.ragged(layer)[n], wanted.pooled(way, wanted.layers[layer])) <= BOUND


def test_every_pooling_equals_its_definition(client: Client, oracle: Oracle) -> None:
    found = client.embed(INPUTS, pooling=list(POOLINGS))
    for n, item in enumerate(INPUTS):
        rows = oracle.text(item)[0][-1]
        for pool, strategy in zip(found.pools, POOLINGS, strict=True):
            assert worst(pool[n], POOLINGS[strategy](rows).astype(np.float32)) <= BOUND, strategy


def test_a_text_has_the_same_bits_alone_and_in_any_batch(client: Client) -> None:
    assert client.model_info().batch_invariant
    together = embed(client, [*INPUTS, *INPUTS])
    for n, item in enumerate(INPUTS):
        alone = embed(client, [item])
        for layer in alone.layers:
            for copy in (n, n + len(INPUTS)):
                assert np.array_equal(together.ragged(layer)[copy], alone.ragged(layer)[0]), layer


def test_encode_equals_sentence_transformers(client: Client, folder: Path) -> None:
    judge = SentenceTransformer(str(folder), device="cpu")
    texts = [item for item in INPUTS if isinstance(item, str)] + [LONG[0]]
    for output_value in ("sentence_embedding", "token_embeddings"):
        found = client.encode(texts, output_value=output_value)
        for own, wanted in zip(found, judge.encode(texts, output_value=output_value), strict=True):
            assert worst(own, np.asarray(wanted)) <= 1e-5


def test_parity_passes(address: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["parity", "--target", address, "--model-id", str(folder)]) == 0
    assert "pass: no difference is above 2e-05" in capsys.readouterr().out


def test_the_model_info_tells_the_type(client: Client, folder: Path, oracle: Oracle) -> None:
    info, config = client.model_info(), json.loads((folder / "config.json").read_text())
    assert info.model_type == config["model_type"] == folder.name
    roberta = folder.name in ("roberta", "xlm-roberta", "camembert")
    assert info.max_length == config["max_position_embeddings"] - 2 * roberta
    assert info.pad_token_id == oracle.tokenizer.pad_token_id == roberta
    assert info.type_vocab_size == (0 if folder.name == "distilbert" else 2)
    with pytest.raises(InvalidArgumentError, match=f"most is {info.max_length}"):
        client.embed(TokenIds([5] * (info.max_length + 1)))


def test_what_a_type_does_not_have_is_refused(client: Client, folder: Path) -> None:
    if folder.name in family.WITHOUT_POOLER:
        with pytest.raises(FailedPreconditionError, match="no pooler"):
            client.embed("a text", pooler_output=True)
    if folder.name == "distilbert":
        with pytest.raises(InvalidArgumentError, match="entries must be from 0 to 0"):
            client.embed(TokenIds([5, 6], None, [0, 1]))
        assert client.embed(TokenIds([5, 6], None, [0, 0])).last_hidden_state.shape == (1, 2, 32)
