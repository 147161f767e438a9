"""Word vectors and layer mixes: equal to what is made by hand of transformers' hidden states, by every way to ask."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from support import BOUND, Server, open_client, running, worst
from support.oracle import Oracle, WordsReference

from layertap import Embedding, LayerMix, Pooling, wire
from layertap.v1 import embedding_pb2 as pb
from layertap.v1 import embedding_pb2_grpc

TEXTS: list[Any] = [
    "I love tokenization, don't you?",
    "",
    "我爱北京 and 👩‍👩‍👧‍👦 e\u0301te\u0301 Z\u0351\u0352algo a\u0000b \u200bx",
    "straßenbahnhaltestelle",
    ("the first, unbelievably", "the second embeddings"),
    ("", "only a second"),
    ["tokenization", "", "\u0000", "two words", "don't", "\u200b", "东京x", "x"],
    [""],
    ["", "embeddings", ""],
]
"""Many scripts; words of several pieces, and of none."""

LONG: list[Any] = [
    "I love tokenization, don't you?",
    ["tokenization", "", "of", "embeddings", "today"],
    ("one two three", "four embeddings six seven"),
    ["a"],
]
"""To be cut."""


def mixed(mix: LayerMix, layers: list[np.ndarray]) -> np.ndarray:
    """Mixes layers by hand."""
    chosen = layers if mix.layers == "all" else [layers[layer] for layer in mix.layers]
    if mix.strategy == "concat":
        return np.concatenate(chosen, axis=1)
    weights = {"mean": [1 / len(chosen)] * len(chosen), "sum": [1.0] * len(chosen)}.get(mix.strategy, mix.weights)
    return np.sum([weight * layer for weight, layer in zip(weights, chosen, strict=True)], axis=0, dtype=np.float32)


MIXES = [
    LayerMix("mean", layers=[-4, -3, -2, -1]),
    LayerMix("sum", layers=[0, 2]),
    LayerMix("concat", layers=[-1, -2, 0]),
    LayerMix("weighted", layers=[1, -1, 0], weights=[0.5, -2.0, 0.25]),
    LayerMix("mean", layers="all"),
    LayerMix("concat", layers=[1]),
]
mixes = pytest.mark.parametrize("mix", MIXES, ids=lambda mix: f"{mix.strategy} of {mix.layers}")
ways = pytest.mark.parametrize("way", wire.WORD_POOLINGS)


def check_words(found: Embedding, index: int, wanted: WordsReference, way: str, layers: list[int]) -> None:
    """Checks the words of one text of an embedding against those made by hand."""
    words = found.words
    assert words.word_counts[index] == len(wanted.pieces)
    assert words.piece_counts[index].tolist() == list(map(len, wanted.pieces))
    assert words.offsets[index].tolist() == wanted.offsets and words.offsets[index].shape == (len(wanted.pieces), 2)
    assert words.sequence_ids[index].tolist() == wanted.sequence_ids
    assert list(words.layers) == layers and found.layers == ()
    for layer in layers:
        vectors = words.ragged(layer)[index]
        assert worst(vectors, wanted.pooled(way, wanted.layers[layer])) <= BOUND, layer
        for row, own in zip(vectors, wanted.pieces, strict=True):
            assert own or not row.any()
        padded = words[layer][index]
        assert np.array_equal(padded[: len(vectors)], vectors) and not padded[len(vectors) :].any()


def by_every_way(client: Any, inputs: list[Any], **options: Any) -> Iterator[tuple[Embedding, list[int]]]:
    """Yields embeddings with the items that each is of: of one request, and of a stream."""
    yield client.embed(inputs, **options), list(range(len(inputs)))
    for result in client.embed_stream(inputs, on_error="raise", **options):
        yield result.embedding, [result.index]


@ways
def test_words_of_every_layer_equal_their_definition(real: Any, real_oracle: Oracle, way: str) -> None:
    wanted = [WordsReference(real_oracle, item) for item in TEXTS]
    for found, items in by_every_way(real, TEXTS, words=way, layers="all"):
        for position, item in enumerate(items):
            check_words(found, position, wanted[item], way, list(range(7)))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_length", [3, 5, 6, 8])
def test_words_that_were_cut(tiny: Any, tiny_oracle: Oracle, side: str, max_length: int) -> None:
    wanted = [WordsReference(tiny_oracle, item, truncation=side, max_length=max_length) for item in LONG]
    for found, items in by_every_way(tiny, LONG, words="mean", layers=[1, -1], truncation=side, max_length=max_length):
        for position, item in enumerate(items):
            check_words(found, position, wanted[item], "mean", [1, 3])
    assert [len(one.pieces) for one in wanted][1] == 5  # Words that were given keep their rows.


def test_offsets_lead_back_to_the_text(tiny: Any) -> None:
    text = "Tokenization of Zürich's trams:\u00a0unbelievable!"
    (offsets,) = tiny.embed(text, words="first").words.offsets
    wanted = ["Tokenization", "of", "Zürich", "'", "s", "trams", ":", "unbelievable", "!"]
    assert [text[start:end] for start, end in offsets] == wanted


def test_a_prompt_has_words_too(tiny: Any, tiny_oracle: Oracle) -> None:
    wanted = WordsReference(tiny_oracle, "query: I love tokenization")
    found = tiny.embed("I love tokenization", prompt="query: ", words="mean", layers=[2])
    check_words(found, 0, wanted, "mean", [2])


@mixes
def test_mixes_of_tokens_words_and_texts_equal_their_definition(tiny: Any, tiny_oracle: Oracle, mix: LayerMix) -> None:
    wanted = [WordsReference(tiny_oracle, item) for item in TEXTS]
    rows = [mixed(mix, one.layers) for one in wanted]
    for found, items in by_every_way(tiny, TEXTS, mix=mix, layers=[2]):
        assert found.layers == (2,) and found.mixed.layers == tuple(
            range(4) if mix.layers == "all" else (layer % 4 for layer in mix.layers)
        )
        for position, item in enumerate(items):
            assert worst(found.mixed.ragged()[position], rows[item]) <= 4 * BOUND
            padded, count = found.mixed.padded[position], len(rows[item])
            assert np.array_equal(padded[:count], found.mixed.ragged()[position]) and not padded[count:].any()
            assert worst(found.ragged(2)[position], wanted[item].layers[2]) <= BOUND
    for found, items in by_every_way(tiny, TEXTS, mix=mix, words="first_last"):
        assert found.words.layers == ()
        for position, item in enumerate(items):
            vectors = wanted[item].pooled("first_last", rows[item])
            assert worst(found.words.mixed.ragged()[position], vectors) <= 4 * BOUND
    pools = [
        Pooling("mean", layer=mix),
        Pooling("max", layer=mix, normalize=True),
        Pooling("cls", layer=mix, dimensions=20),
        Pooling("mean_max", layer=mix),
        Pooling("max", layer=1),
    ]
    for found, items in by_every_way(tiny, TEXTS, pooling=pools):
        for position, item in enumerate(items):
            own = rows[item]
            one = own.max(0) / np.linalg.norm(own.max(0))
            both = np.concatenate([own.mean(0), own.max(0)])
            expected = [own.mean(0), one, own[0][:20], both, wanted[item].layers[1].max(0)]
            for pool, vector in zip(found.pools, expected, strict=True):
                assert worst(pool[position], vector) <= 4 * BOUND


def test_words_and_mixes_beside_each_other_on_the_real_model(real: Any, real_oracle: Oracle) -> None:
    mix = LayerMix("concat", layers=[-4, -3, -2, -1])
    options = {"words": "mean", "layers": [-1], "mix": mix, "pooling": ["mean", Pooling("mean", layer=mix)]}
    wanted = [WordsReference(real_oracle, item) for item in TEXTS]
    for found, items in by_every_way(real, TEXTS, **options, pooler_output=True, return_tokens=True):
        assert found.words.mixed.layers == (3, 4, 5, 6)
        for position, item in enumerate(items):
            check_words(found, position, wanted[item], "mean", [6])
            rows = mixed(mix, wanted[item].layers)
            assert worst(found.words.mixed.ragged()[position], wanted[item].pooled("mean", rows)) <= BOUND
            assert worst(found.pools[1][position], rows.mean(0)) <= BOUND
            assert len(found.tokens.tokens[position]) == found.token_counts[position]


def test_the_model_runs_no_further_than_the_mix(tiny: Any, tiny_oracle: Oracle) -> None:
    # Deeper texts share the batch; each still gets its own.
    wanted = WordsReference(tiny_oracle, "I love Paris")
    shallow = tiny.embed(["I love Paris"] * 3, mix=LayerMix("sum", layers=[1, 0]))
    assert worst(shallow.mixed.ragged()[2], wanted.layers[0] + wanted.layers[1]) <= BOUND


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_words_are_the_rounded_ones(tiny: Any, dtype: str) -> None:
    whole = tiny.embed(TEXTS, words="first_last", mix=MIXES[3], layers="all")
    half = tiny.embed(TEXTS, words="first_last", mix=MIXES[3], layers="all", dtype=dtype)
    step = {"float16": 2**-10, "bfloat16": 2**-7}[dtype]
    pairs = [(half.words[layer], whole.words[layer]) for layer in whole.words.layers]
    for found, exact in [*pairs, (half.words.mixed.padded, whole.words.mixed.padded)]:
        assert found.dtype == (np.float16 if dtype == "float16" else np.float32)
        assert np.all(np.abs(found - exact) <= step * np.abs(exact) + 1e-4)


@pytest.fixture(scope="module")
def small_server(tiny_folder: Path) -> Iterator[Server]:
    """Shares memory, and cuts what it sends into small frames."""
    flags = ("--shared-memory-bytes", str(64 << 20), "--max-frame-bytes", "16384")
    with running("--device", "cpu", "--model-id", str(tiny_folder), *flags) as started:
        yield started


@pytest.mark.parametrize("shared", [False, True], ids=["sent", "in shared memory"])
def test_many_words_in_small_frames_and_in_shared_memory(kind: str, small_server: Server, shared: bool) -> None:
    # Texts without words stand first, last and between, so that rows of words begin elsewhere than those of tokens.
    some: list[Any] = ["", "tokenization " * 140, [""], ["embeddings"] * 120, "", "x", *["don't you? " * 20] * 30, ""]
    options: dict[str, Any] = {"words": "first_last", "layers": "all", "mix": MIXES[2], "pooling": "mean"}
    plain = open_client("sync", small_server.address)
    client = open_client(kind, small_server.address, shared_memory=shared)
    wanted = [plain.embed([item], **options) for item in some]
    for found, items in by_every_way(client, some, **options):
        for position, item in enumerate(items):
            assert found.words.piece_counts[position].tolist() == wanted[item].words.piece_counts[0].tolist()
            assert found.words.offsets[position].tolist() == wanted[item].words.offsets[0].tolist()
            for layer in range(4):
                assert worst(found.words.ragged(layer)[position], wanted[item].words.ragged(layer)[0]) <= BOUND
            assert worst(found.words.mixed.ragged()[position], wanted[item].words.mixed.ragged()[0]) <= BOUND
            assert worst(found.pooled[position], wanted[item].pooled[0]) <= BOUND
    assert (client.shared_memory.byte_count > 0) == shared
    client.close()
    plain.close()


def test_a_stock_client_reads_words_and_mixes_from_unary_embed(tiny_server: Server, tiny_oracle: Oracle) -> None:
    mix = pb.LayerMix(strategy=pb.MIX_STRATEGY_WEIGHTED, layers=[3, 1], weights=[2.0, 0.5])
    outputs = [
        pb.Output(word_vectors=pb.WordVectors(layers=[-1, 0], pooling=pb.WORD_POOLING_LAST)),
        pb.Output(hidden_states=pb.HiddenStates(mix=mix)),
        pb.Output(word_vectors=pb.WordVectors(mix=mix)),
        pb.Output(pooled_vectors=pb.PooledVectors(mix=mix)),
    ]
    inputs = [pb.Input(text="don't tokenization"), pb.Input(words=pb.Words(words=["", "tokenization"]))]
    with grpc.insecure_channel(tiny_server.address) as channel:
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        answer = stub.Embed(pb.EmbedRequest(inputs=inputs, options=pb.EmbedOptions(outputs=outputs)), timeout=30)
    header = answer.header
    assert [output.unit for output in header.outputs] == [
        pb.ROW_UNIT_WORD,
        pb.ROW_UNIT_TOKEN,
        pb.ROW_UNIT_WORD,
        pb.ROW_UNIT_TEXT,
    ]
    assert [list(output.layers) for output in header.outputs] == [[0, 3], [3], [3], [3]]
    assert [list(output.mixed_layers) for output in header.outputs] == [[], [3, 1], [3, 1], [3, 1]]
    assert list(header.word_counts) == [4, 2]
    wanted = [WordsReference(tiny_oracle, "don't tokenization"), WordsReference(tiny_oracle, ["", "tokenization"])]
    assert [list(words.piece_counts) for words in answer.words] == [list(map(len, one.pieces)) for one in wanted]
    for words, one in zip(answer.words, wanted, strict=True):
        assert list(words.offsets) == list(itertools.chain.from_iterable(one.offsets))
        assert words.first_word_count == len(one.pieces)
    own = LayerMix("weighted", layers=[3, 1], weights=[2.0, 0.5])
    rows = [mixed(own, one.layers) for one in wanted]
    expected = [
        np.concatenate([one.pooled("last", one.layers[0]) for one in wanted]),
        np.concatenate([one.pooled("last", one.layers[3]) for one in wanted]),
        np.concatenate(rows),
        np.concatenate([one.pooled("mean", own) for one, own in zip(wanted, rows, strict=True)]),
        np.stack([own.mean(0) for own in rows]),
    ]
    for tensor, array in zip(answer.tensors, expected, strict=True):
        assert worst(wire.tensor_to_array(tensor.tensor), array) <= BOUND


def test_what_was_not_asked_for_says_how_to_ask(tiny: Any) -> None:
    bare, worded = tiny.embed("I love Paris"), tiny.embed("I love Paris", words="mean", mix=MIXES[0])
    with pytest.raises(LookupError, match="words="):
        _ = bare.words
    with pytest.raises(LookupError, match="mix=LayerMix"):
        _ = bare.mixed
    with pytest.raises(LookupError, match=r"\.words\.mixed"):
        _ = worded.mixed
    with pytest.raises(LookupError, match="mix=LayerMix"):
        _ = tiny.embed("I love Paris", words="mean").words.mixed
    with pytest.raises(IndexError, match="layer -1 is not held"):
        _ = worded.words[-1]
    assert "word_count=3" in repr(worded.words) and "layers=0…3" in repr(worded.words.mixed)
    assert f"words={worded.words!r}" in repr(worded)
    assert "mixed=MixedRows(layers=0…3, each=float32" in repr(tiny.embed("a", mix=MIXES[0]))


def test_words_and_mixes_become_tables_and_are_never_taken_for_the_only_array(tiny: Any) -> None:
    options = {"words": "mean", "layers": [1, 2], "mix": MIXES[0], "pooling": "mean"}
    found = tiny.embed(["I love Paris", "", "tokenization"], **options)
    table = found.to_arrow()
    assert table.column_names[2:] == [
        *("word_counts", "word_offsets", "words_layer_1", "words_layer_2", "words_mixed", "pool_0")
    ]
    assert table["word_counts"].to_pylist() == [3, 0, 1]
    assert table["word_offsets"].to_pylist() == [own.tolist() for own in found.words.offsets]
    for name, rows in (("words_layer_1", found.words.ragged(1)), ("words_mixed", found.words.mixed.ragged())):
        assert all(np.array_equal(cell, own) for cell, own in zip(found.to_pandas()[name], rows, strict=True))
    assert "mixed" in tiny.embed("I love Paris", mix=MIXES[0]).to_arrow().column_names
    with pytest.raises(TypeError, match="words"):
        np.asarray(found)
    copy = pickle.loads(pickle.dumps(found))
    assert np.array_equal(copy.words[2], found.words[2]) and copy.words.mixed.layers == found.words.mixed.layers
