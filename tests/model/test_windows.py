"""Long texts as windows, on every model type: all outputs equal what transformers gives by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling as STPooling
from support import BOUND, family, worst
from support.in_process import serving
from support.oracle import POOLINGS, Oracle, WordsReference
from support.windows import WindowsReference, tokens_of

from layertap import Client, InvalidArgumentError, LayerMix, Pooling, Spanned, TokenIds, Windows, cli

LONG = "The quick brown fox jumps over the lazy dog, and Résumé 東京 sleeps in Paris; unbelievably. " * 9
SHORT = "I love Paris"
LENGTH, STRIDE = 40, 17
ONE_TYPE = pytest.mark.parametrize("folder", ["bert"], indirect=True, scope="module")
CUT: dict[str, Any] = {"max_length": LENGTH, "windows": Windows(stride=STRIDE)}


@pytest.fixture(scope="module", params=list(family.TOKENIZERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family.save(request.param, tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle.load(folder)


@pytest.fixture(scope="module")
def reference(oracle: Oracle) -> WindowsReference:
    return WindowsReference(oracle, LONG, max_length=LENGTH, stride=STRIDE)


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    with serving(folder) as address, Client(address) as opened:
        yield opened


def test_every_layer_and_the_pooler_equal_transformers(client: Client, reference: WindowsReference) -> None:
    has_pooler = client.model_info().has_pooler_output
    found = client.embed([SHORT, LONG, SHORT], layers="all", pooler_output=has_pooler, return_tokens=True, **CUT)
    assert found.window_counts.tolist() == [1, reference.count, 1] and reference.count > 4
    assert found.token_counts[1] == reference.token_count and not found.truncated.any()
    for layer, rows in enumerate(reference.layers):
        assert worst(found.ragged(layer)[1], rows) <= BOUND, layer
    if has_pooler:
        assert worst(found.pooler_output[1], reference.pooler_output) <= BOUND
    count = reference.token_count
    assert found.tokens.input_ids[1, :count].tolist() == reference.whole["input_ids"]
    (alone,) = client.embed(SHORT, layers="all")
    for layer in range(len(reference.layers)):
        assert np.array_equal(found.ragged(layer)[0], alone.ragged(layer)[0])
        assert np.array_equal(found.ragged(layer)[2], alone.ragged(layer)[0])


@pytest.mark.parametrize("stride", [0, 1, 37])
def test_any_stride(client: Client, oracle: Oracle, stride: int) -> None:
    text = LONG[:200]
    wanted = WindowsReference(oracle, text, max_length=LENGTH, stride=stride)
    found = client.embed(text, max_length=LENGTH, windows=Windows(stride=stride))
    assert found.window_counts.tolist() == [wanted.count]
    assert worst(found.ragged(-1)[0], wanted.layers[-1]) <= BOUND


def test_the_models_own_length_is_the_default(client: Client, oracle: Oracle) -> None:
    most = client.model_info().default_max_length
    wanted = WindowsReference(oracle, LONG, max_length=most, stride=8)
    assert worst(client.embed(LONG, windows=Windows(stride=8)).ragged(-1)[0], wanted.layers[-1]) <= BOUND


@pytest.mark.parametrize("special", [True, False], ids=["special", "plain"])
def test_pools_run_over_the_whole_text(client: Client, reference: WindowsReference, special: bool) -> None:
    ways = [way for way in POOLINGS if special or way != "cls"]
    poolings = [Pooling(way, include_special_tokens=special) for way in ways]
    shaped = Pooling("mean_max", layer=1, include_special_tokens=special, normalize=True, dimensions=40)
    mixed = Pooling("max", layer=LayerMix("concat", [0, -1]), include_special_tokens=special)
    found = client.embed([LONG, SHORT], pooling=[*poolings, shaped, mixed], **CUT)
    kept = slice(None) if special else slice(1, -1)
    rows = reference.layers[-1][kept]
    for way, pool in zip(ways, found.pools, strict=False):
        # A sum of rows that may each be off by the bound, divided by the root of their number.
        bound = BOUND * np.sqrt(len(rows)) if way == "mean_sqrt_len" else BOUND
        assert worst(pool[0], POOLINGS[way](rows)) <= bound, way
    wanted = POOLINGS["mean_max"](reference.layers[1][kept])[:40]
    assert worst(found.pools[-2][0], wanted / np.linalg.norm(wanted)) <= BOUND
    concat = np.concatenate([reference.layers[0], reference.layers[-1]], axis=1)[kept]
    assert worst(found.pools[-1][0], concat.max(0)) <= BOUND
    alone = client.embed(SHORT, pooling=[*poolings, shaped, mixed])
    assert all(np.array_equal(pool[1], own[0]) for pool, own in zip(found.pools, alone.pools, strict=True))


@pytest.mark.parametrize("item", [LONG, LONG.replace("sleeps", "").split(" ")], ids=["string", "words"])
@pytest.mark.parametrize("way", ["first", "last", "mean", "first_last"])
def test_words_and_mixes(client: Client, oracle: Oracle, item: Any, way: Any) -> None:
    wanted = WindowsReference(oracle, item, max_length=LENGTH, stride=STRIDE)
    oracle_words = WordsReference.__new__(WordsReference)
    spans = oracle.tokenizer(item, is_split_into_words=isinstance(item, list), return_offsets_mapping=True)
    pieces: dict[int, list[int]] = {n: [] for n in range(len(item))} if isinstance(item, list) else {}
    for position, number in enumerate(spans.word_ids()):
        if number is not None:
            pieces.setdefault(number, []).append(position)
    oracle_words.pieces = list(pieces.values())
    found = client.embed([item], words=way, layers="all", mix=LayerMix("mean", "all"), **CUT)
    assert found.words.piece_counts[0].tolist() == [len(own) for own in oracle_words.pieces]
    for layer, rows in enumerate(wanted.layers):
        assert worst(found.words.ragged(layer)[0], oracle_words.pooled(way, rows)) <= BOUND, layer
    mixed = np.mean(wanted.layers, axis=0, dtype=np.float64).astype(np.float32)
    assert worst(found.words.mixed.ragged()[0], oracle_words.pooled(way, mixed)) <= BOUND
    whole = client.embed([item], mix=LayerMix("mean", "all"), **CUT)
    assert worst(whole.mixed.ragged()[0], mixed) <= BOUND


def test_all_calls_give_the_same_bits_in_any_company(client: Client) -> None:
    """A long text is spread over batches, in which it meets others; its rows and pools must not depend on that."""
    options: dict[str, Any] = {"layers": [0, -1], "pooling": ["mean", "max", "mean_sqrt_len"], "words": "mean", **CUT}
    assert client.model_info().batch_invariant
    alone = client.embed(LONG, **options)
    texts = [SHORT, LONG, SHORT * 5, LONG, LONG[:300], ""] * 3
    together = client.embed(texts, **options)
    streamed = {result.index: result.embedding for result in client.embed_stream(texts, ordered=False, **options)}
    for index, text in enumerate(texts):
        assert streamed[index].window_counts[0] == together.window_counts[index]
        for layer in (0, -1):
            rows = together.words.ragged(layer)[index]
            assert np.array_equal(streamed[index].words.ragged(layer)[0], rows)
            assert text is not LONG or np.array_equal(alone.words.ragged(layer)[0], rows)
        for pool, own, lone in zip(together.pools, streamed[index].pools, alone.pools, strict=True):
            assert np.array_equal(pool[index], own[0])
            assert text is not LONG or np.array_equal(pool[index], lone[0])


def test_layers_come_while_windows_are_computed(client: Client, reference: WindowsReference) -> None:
    wanted = client.embed([LONG, SHORT, LONG], layers="all", **CUT)
    seen = set()
    for part in client.embed_layers([LONG, SHORT, LONG], **CUT):
        for text, rows in zip(part.texts, part.rows, strict=True):
            seen.add((part.layer, text))
            assert np.array_equal(rows, wanted.ragged(part.layer)[text])
    assert seen == {(layer, text) for layer in range(len(reference.layers)) for text in range(3)}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_answers(client: Client, dtype: Any) -> None:
    """What windows make together is narrowed once, at the end, as all other rows are."""
    options: dict[str, Any] = {"layers": -1, "pooling": [Pooling("mean", normalize=True), "max"], **CUT}
    wide, narrow = client.embed(LONG, **options), client.embed(LONG, dtype=dtype, **options)
    for pool, own in zip(wide.pools, narrow.pools, strict=True):
        assert np.allclose(own, pool, rtol=2.0 ** (-11 if dtype == "float16" else -8), atol=1e-6)
    assert np.allclose(
        narrow.ragged(-1)[0], wide.ragged(-1)[0], rtol=2.0 ** (-11 if dtype == "float16" else -8), atol=1e-6
    )


def test_a_prompt_is_in_the_first_window_and_pools_leave_it_out(oracle: Oracle, folder: Path, tmp_path: Path) -> None:
    prompted = tmp_path / "prompted"
    modules = [Transformer(str(folder)), STPooling(32, pooling_mode="mean", include_prompt=False)]
    SentenceTransformer(modules=modules, device="cpu", prompts={"query": "I love: "}).save(str(prompted))
    wanted = WindowsReference(oracle, "I love: " + LONG, max_length=LENGTH, stride=STRIDE)
    first = len(oracle.tokenizer("I love: ")["input_ids"]) - 1
    with serving(prompted) as address, Client(address) as client:
        found = client.embed(LONG, prompt_name="query", layers=-1, pooling=["mean", "cls"], **CUT)
    assert worst(found.ragged(-1)[0], wanted.layers[-1]) <= BOUND
    assert worst(found.pools[0][0], wanted.layers[-1][first:].mean(0)) <= BOUND
    assert worst(found.pools[1][0], wanted.layers[-1][first]) <= BOUND


@pytest.mark.parametrize("with_dense", [False, True], ids=["plain", "dense"])
def test_encode_cuts_nothing(oracle: Oracle, folder: Path, tmp_path: Path, with_dense: bool) -> None:
    """Sentence-transformers' own modules make the vector of the rows that the windows give."""
    torch.manual_seed(0)
    dense = [Dense(64, 24, activation_function=torch.nn.Tanh())] if with_dense else []
    modules = [Transformer(str(folder)), STPooling(32, pooling_mode=["mean", "max"]), *dense, Normalize()]
    judge = SentenceTransformer(modules=modules, device="cpu")
    judge.max_seq_length = LENGTH
    judge.save(str(tmp_path / "saved"))
    reference = WindowsReference(oracle, LONG, max_length=LENGTH, stride=STRIDE)
    features = {
        "token_embeddings": torch.from_numpy(reference.layers[-1])[None],
        "attention_mask": torch.ones(1, reference.token_count, dtype=torch.long),
    }
    with torch.no_grad():
        for module in list(judge)[1:]:
            features = module(features)
    with serving(tmp_path / "saved") as address, Client(address) as client:
        found = client.encode([LONG, SHORT, LONG], windows=Windows(stride=STRIDE))
        assert worst(found[0], features["sentence_embedding"][0].numpy()) <= BOUND
        assert np.array_equal(found[2], found[0]) and np.array_equal(found[1], client.encode(SHORT))
        rows = client.encode(LONG, windows=Windows(stride=STRIDE), output_value="token_embeddings")
        assert worst(rows, reference.layers[-1]) <= BOUND


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "attentions": (SHORT, {"attentions": -1, **CUT}, "outputs.1. is attentions.*windows"),
    "truncation": (LONG, {"truncation": "right", **CUT}, "windows.*leave truncation out"),
    "a negative stride": (LONG, {"windows": Windows(stride=-1)}, "stride is -1.*from 0 to 6."),
    "a stride as long as a window": (LONG, {"max_length": 40, "windows": Windows(stride=38)}, "38.*from 0 to 37"),
    "a long pair": ([SHORT, (SHORT, LONG)], CUT, "inputs.1. is a pair.*max_length is 40"),
    "long token ids": ([[5] * 70], {"windows": Windows(stride=3)}, "inputs.0. has 70 token ids"),
    "too many windows": (LONG * 9, {"max_length": 10, "windows": Windows(stride=7)}, "windows, the most is 1024"),
    "what is no Windows": (LONG, {"windows": 128}, "windows is of type int; pass Windows"),
}


@ONE_TYPE
@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_windows_is_refused_by_name(client: Client, case: str) -> None:
    item, options, reason = REFUSED[case]
    with pytest.raises(InvalidArgumentError, match=reason) as caught:
        client.embed(item, **options)
    assert "fox" not in str(caught.value)
    assert client.embed(LONG, **CUT).window_counts[0] > 1


@ONE_TYPE
def test_in_a_stream_a_text_with_too_many_windows_is_refused_alone(client: Client) -> None:
    options: dict[str, Any] = {"max_length": 10, "windows": Windows(stride=7), "pooling": "mean"}
    found = list(client.embed_stream([SHORT, LONG * 9, LONG[:200]], **options))
    assert [result.error is None for result in found] == [True, False, True]
    assert isinstance(found[1].error, InvalidArgumentError) and "item 1" in str(found[1].error)
    assert found[2].embedding.window_counts[0] > 1


@ONE_TYPE
def test_outputs_of_a_long_text_count_as_those_of_one(folder: Path) -> None:
    with serving(folder, max_call_output_bytes=200_000, max_output_bytes=400_000) as address, Client(address) as client:
        with pytest.raises(InvalidArgumentError, match=r"outputs of inputs.0. take .* most is 200000.*pools"):
            client.embed(LONG * 5, layers="all", **CUT)
        for _ in range(3):  # Nothing is held of what came before.
            assert client.embed([LONG * 5] * 5, pooling="mean", **CUT).pooled.shape == (5, 32)


def test_a_text_of_100_000_tokens_within_the_default_limits(tmp_path: Path) -> None:
    folder = family.save("bert", tmp_path / "long", max_position_embeddings=512)
    text = "東" * 100_000
    with serving(folder) as address, Client(address) as client:
        limits = client.model_info().limits
        assert len(text) == limits.max_character_count
        found = client.embed(text, layers=-1, pooling=["mean", "max"], max_length=512, windows=Windows(stride=128))
        assert found.token_counts.tolist() == [100_002]
        assert 1 < found.window_counts[0] == 262 <= limits.max_window_count
        rows = found.ragged(-1)[0]
        assert worst(found.pools[0][0], rows.mean(0, dtype=np.float64)) <= BOUND
        assert np.array_equal(found.pools[1][0], rows.max(0))


SPANS = [(0, 3), (4, 9), (100, 300), (0, len(LONG)), (250, 252), (2, 3), (len(LONG) - 20, len(LONG)), (99, 700)]


@pytest.mark.parametrize("text", [LONG, LONG[:60]], ids=["windows", "whole"])
def test_spans_are_pooled_from_the_rows_of_the_whole_text(client: Client, oracle: Oracle, text: str) -> None:
    spans = [span for span in SPANS if span[1] <= len(text)]
    ways: list[Any] = [way for way in POOLINGS if way != "cls"]
    shaped = [Pooling("mean", layer=LayerMix("mean", "all"), normalize=True), Pooling("max", layer=0, dimensions=7)]
    found = client.embed([SHORT, text], spans=[[(0, 1)], spans], span_pooling=[*ways, *shaped], layers="all", **CUT)
    assert found.spans.span_counts.tolist() == [1, len(spans)]
    layers = [found.ragged(layer)[1] for layer in range(4)]
    if text is LONG:
        wanted = WindowsReference(oracle, text, max_length=LENGTH, stride=STRIDE).layers
        assert all(worst(own, rows) <= BOUND for own, rows in zip(layers, wanted, strict=True))
    for number, span in enumerate(spans):
        tokens = tokens_of(oracle, text, span)
        for n, way in enumerate(ways):
            bound = BOUND * np.sqrt(len(tokens)) if way == "mean_sqrt_len" else BOUND
            assert worst(found.spans.ragged(n)[1][number], POOLINGS[way](layers[-1][tokens])) <= bound, (span, way)
        mixed = np.mean(layers, axis=0, dtype=np.float64)[tokens].mean(0)
        assert worst(found.spans.ragged(len(ways))[1][number], mixed / np.linalg.norm(mixed)) <= BOUND
        assert worst(found.spans.ragged(len(ways) + 1)[1][number], layers[0][tokens].max(0)[:7]) <= BOUND


def test_spans_of_tokens_pairs_words_and_masks(client: Client) -> None:
    items = [("a pair", "of two"), ["some", "words"], TokenIds([5, 6, 7, 8], [1, 0, 1, 1]), LONG]
    spans = [(0, 3), (1, 4), (3, 4)]
    for item in items:
        found = client.embed([Spanned(item, spans, unit="tokens")], layers=-1, span_pooling="mean", **CUT)
        rows, mask = found.ragged(-1)[0], found.attention_mask[0] == 1
        for vector, (start, end) in zip(found.spans.ragged()[0], spans, strict=True):
            assert worst(vector, rows[start:end][mask[start:end]].mean(0)) <= BOUND


def test_spans_have_the_same_bits_in_every_call(client: Client) -> None:
    options: dict[str, Any] = {"span_pooling": ["mean", "last"], "pooling": "mean", **CUT}
    some = [Spanned(LONG, SPANS), SHORT, Spanned(SHORT, [(0, 3)]), Spanned(LONG, []), Spanned(LONG, SPANS[::-1]), LONG]
    items = some * 3
    together = client.embed(items, **options)
    streamed = {result.index: result.embedding for result in client.embed_stream(items, ordered=False, **options)}
    for n in range(2):
        whole = together.spans.ragged(n)
        assert [len(rows) for rows in whole[:6]] == [len(SPANS), 0, 1, 0, len(SPANS), 0]
        assert np.array_equal(whole[0], whole[4][::-1])
        for index in range(len(items)):
            assert np.array_equal(streamed[index].spans.ragged(n)[0], whole[index])
            assert np.array_equal(whole[index], whole[index % 6])


@ONE_TYPE
def test_over_shared_memory_the_bits_are_the_same(folder: Path) -> None:
    options: dict[str, Any] = {"layers": [0, -1], "pooling": "mean", "words": "mean", "span_pooling": "max", **CUT}
    items = [SHORT, Spanned(LONG, SPANS), SHORT * 3, LONG, SHORT]
    with (
        serving(folder, shared_memory_bytes=8 << 20) as address,
        Client(address, shared_memory=True) as shared,
        Client(address, shared_memory=False) as plain,
    ):
        wanted, found = plain.embed(items, **options), shared.embed(items, **options)
        streamed = [result.embedding for result in shared.embed_stream(items, **options)]
        for index in range(len(items)):
            for layer in (0, -1):
                rows = wanted.words.ragged(layer)[index]
                assert np.array_equal(found.words.ragged(layer)[index], rows)
                assert np.array_equal(streamed[index].words.ragged(layer)[0], rows)
            assert np.array_equal(found.pooled[index], wanted.pooled[index])
            assert np.array_equal(streamed[index].pooled[0], wanted.pooled[index])
            assert np.array_equal(streamed[index].spans.ragged()[0], wanted.spans.ragged()[index])
        layers = {
            text: rows
            for part in shared.embed_layers([SHORT, LONG], layers=-1, **CUT)
            for text, rows in zip(part.texts, part.rows, strict=True)
        }
        for text, rows in enumerate(plain.embed([SHORT, LONG], layers=-1, **CUT).ragged(-1)):
            assert np.array_equal(layers[text], rows)


@ONE_TYPE
def test_the_command_line(client: Client, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(folder) as address:
        flags = ["--target", address, "--max-length", str(LENGTH), "--window-stride", str(STRIDE), "--pooling", "mean"]
        assert cli.main(["embed", "--text", LONG, "--json", *flags]) == 0
        wanted = client.embed(LONG, pooling="mean", **CUT)
        shown = json.loads(capsys.readouterr().out)
        assert shown["token_count"] == wanted.token_counts[0] and not shown["truncated"]
        assert np.allclose(shown["pool_0"], wanted.pooled[0])
        (tmp_path / "long.txt").write_text(f"{LONG}\n{SHORT}\n")
        assert cli.main(["embed", str(tmp_path / "long.txt"), "-o", str(tmp_path / "out.npz"), *flags]) == 0
        with np.load(tmp_path / "out.npz") as found:
            written = found["pool_0"]
        assert np.array_equal(written[0], wanted.pooled[0]) and len(written) == 2
        assert cli.main(["encode", "--text", LONG, "--json", "--target", address, "--window-stride", "8"]) == 0
        vector = client.encode(LONG, windows=Windows(stride=8))
        capsys.readouterr()
        assert vector.shape == (32,)
        with pytest.raises(SystemExit):
            cli.main(["embed", LONG, "--window-stride", "x"])
