"""The engine without a server: its tables have the numbers and the refusals of `embed_stream`, to the last bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support import Server

from layertap import Client, LayerMix, Pooling, Windows
from layertap._protocol import requests
from layertap.cli import main
from layertap.errors import InvalidArgumentError
from layertap_server.offline.embedder import Embedder
from layertap_server.offline.model import OfflineModel
from layertap_server.offline.shards import ShardEmbedder, assign

OPTIONS: dict[str, dict[str, Any]] = {
    "pools": {"pooling": ["mean", Pooling("max", layer=1, normalize=True)], "pooler_output": True},
    "layers": {"layers": "all", "dtype": "float16"},
    "words": {"words": "mean", "mix": LayerMix("concat", layers=[0, -1]), "dtype": "bfloat16"},
    "tokens": {"attentions": [0], "return_tokens": True, "truncation": "right", "max_length": 12},
    "windows": {"windows": Windows(stride=3), "max_length": 20, "layers": [-1], "pooling": "mean"},
}


@pytest.fixture(scope="module")
def client(tiny_server: Server) -> Iterator[Client]:
    with Client(tiny_server.address) as client:
        yield client


@pytest.fixture
def texts() -> list[Any]:
    """Texts of many lengths, some of which are at fault."""
    words = ["paris", "love", "hello", "é", "don't"]
    found: list[Any] = [" ".join(words[(n + k) % 5] for k in range(n % 40)) for n in range(1, 300)]
    found[7], found[100] = None, "word " * 600
    return found


def rows(table: pa.Table, name: str) -> list[Any]:
    """The values of each row of a column as arrays, without a number that becomes a Python object."""
    found = []
    for one in table.column(name):
        if not one.is_valid:
            found.append(None)
        elif isinstance(one, pa.ListScalar) and pa.types.is_fixed_size_list(one.values.type):
            found.append(one.values.flatten().to_numpy(zero_copy_only=False))
        else:
            found.append(one.as_py())
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_a_table_has_what_embed_stream_gives(name: str, client: Client, texts: list[Any], tiny_folder: Path) -> None:
    options = OPTIONS[name]
    embedder = Embedder(model_id=str(tiny_folder), engine={"device": "cpu"}, **options)
    inputs = pa.table({"number": range(len(texts)), "text": texts})
    whole = pa.concat_tables(embedder(inputs))
    whole.validate(full=True)
    assert whole.column("number").to_pylist() == list(range(len(texts)))
    wanted = client.embed_stream(inputs.column("text"), **options)
    reasons = whole.column("error").to_pylist()
    found = {name: rows(whole, name) for name in embedder.schema.names if name != "error"}
    good = 0
    for result, reason in zip(wanted, reasons, strict=True):
        row = result.index
        assert (reason is None) == (result.error is None)
        if result.error is not None:
            assert reason.startswith("INVALID_ARGUMENT: the text ") and "inputs[" not in reason
            assert all(values[row] is None for values in found.values())
            continue
        good += 1
        table = result.embedding.to_arrow()
        assert table.schema.names == [*found]
        for name, values in found.items():
            np.testing.assert_array_equal(rows(table, name)[0], values[row], err_msg=name)
    assert good == len(texts) - (1 if "max_length" in options else 2)
    assert embedder.schema.metadata[b"fingerprint"] == client.model_info().fingerprint.encode()


def test_a_table_without_a_good_text_has_the_same_columns(tiny_folder: Path) -> None:
    embedder = Embedder(model_id=str(tiny_folder), layers=[0], return_tokens=True, pooling="mean", keep=["id"])
    (good,) = embedder(pa.table({"id": [1], "text": ["hello"]}))
    (bad,) = embedder({"id": np.array([2, 3]), "text": np.array([None, None])})
    assert good.schema == bad.schema
    assert bad.column("pool_0").null_count == bad.column("layer_0").null_count == bad.column("tokens").null_count == 2
    (empty,) = embedder(pa.table({"id": pa.array([], pa.int64()), "text": pa.array([], pa.string())}))
    assert empty.num_rows == 0 and empty.schema == good.schema


def test_words_and_token_ids_are_columns_of_lists(client: Client, tiny_folder: Path) -> None:
    embedder = Embedder(model_id=str(tiny_folder), text_column="given", pooling="mean", keep=[])
    for items in ([["hello", "paris"], ["love"]], [[101, 2293, 102], [101, 102]]):
        (table,) = embedder(pa.table({"given": items}))
        wanted = [one.embedding.pooled[0] for one in client.embed_stream(items, pooling="mean")]
        np.testing.assert_array_equal(rows(table, "pool_0"), wanted)


def test_what_cannot_work_is_refused_when_it_is_made_or_called(tiny_folder: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="layer"):
        Embedder(model_id=str(tiny_folder), layers=[99])
    with pytest.raises(TypeError, match="poling"):
        Embedder(model_id=str(tiny_folder), poling="mean")  # type: ignore[call-arg]
    embedder = Embedder(model_id=str(tiny_folder), pooling="mean")
    with pytest.raises(KeyError, match="no column text, there are title"):
        next(embedder(pa.table({"title": ["a"]})))
    with pytest.raises(KeyError, match="pool_0 is there already"):
        next(embedder(pa.table({"text": ["a"], "pool_0": [1]})))


def test_a_text_whose_numbers_do_not_fit_has_its_own_error(client: Client, tiny_folder: Path) -> None:
    texts = [f"hello paris {n}" for n in range(40)]
    tops = [abs(one.embedding.hidden_states[1]).max() for one in client.embed_stream(texts, layers=[1])]
    # So that half of the texts overflow.
    mix = LayerMix("weighted", layers=[1], weights=[65504 / float(np.median(tops))])
    options: dict[str, Any] = {"mix": mix, "pooling": "mean", "dtype": "float16"}
    table = pa.concat_tables(Embedder(model_id=str(tiny_folder), **options)(pa.table({"text": texts})))
    wanted = list(client.embed_stream(texts, **options))
    failed = [one.error is not None for one in wanted]
    assert 0 < sum(failed) < len(texts)
    reasons = table.column("error").to_pylist()
    assert [reason is not None and reason.startswith("OUT_OF_RANGE: ") for reason in reasons] == failed
    pools = rows(table, "pool_0")
    for one in wanted:
        if one.error is None:
            np.testing.assert_array_equal(pools[one.index], one.embedding.pooled[0])
        else:
            assert pools[one.index] is None


@pytest.mark.parametrize("options", [{"pooling": "mean"}, {"layers": "all"}])
def test_a_reader_that_stops_stops_the_reading(options: dict[str, Any], tiny_folder: Path) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        for read in itertools.count():
            yield f"text {read}"

    model = OfflineModel(str(tiny_folder), device="cpu")
    pieces = model.embed(endless(), requests.embed_stream(options))  # type: ignore[arg-type]
    first = next(pieces)
    assert first.embedding is not None and len(first.errors) == len(first.embedding) >= 1024
    pieces.close()  # type: ignore[attr-defined]
    assert read < 10_000


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (["--pooling", "mean", "--layers=-1"], {"pooling": "mean", "layers": -1}),
        (["--words", "mean", "--attentions", "0"], {"words": "mean", "attentions": [0]}),
    ],
)
def test_files_are_those_of_the_command_and_each_passes_over_what_the_other_has_done(
    flags: list[str],
    options: dict[str, Any],
    tiny_server: Server,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    corpus.mkdir()
    for n in range(2):
        (corpus / f"{n}.txt").write_text("".join(f"paris {'love ' * (k % 9)}{k}\n" for k in range(60)))
    with (corpus / "1.txt").open("a") as file:
        file.write("word " * 600 + "\n")
    command = ["embed", str(corpus), "--target", tiny_server.address, *flags]
    assert main([*command, "-o", str(tmp_path / "wanted")]) == 3
    embedder = ShardEmbedder(model_id=str(tiny_folder), engine={"device": "cpu"}, **options)
    first, second = assign(corpus, out)
    assert (embedder(first).text_count, embedder(first).was_done) == (60, True)
    capsys.readouterr()
    assert main([*command, "-o", str(out)]) == 3
    assert capsys.readouterr().out.count("was done before") == 1
    result = embedder(second)
    assert (result.bad_count, result.was_done, result.error) == (1, True, None)
    for name in ("0.parquet", "1.parquet", "_layertap/1.parquet.errors.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes(), name
    (corpus / "0.txt").write_text("other")
    assert "another input" in (embedder(first).error or "")


def test_options_that_files_have_no_place_for_are_refused_before_the_model_is_loaded() -> None:
    with pytest.raises(TypeError, match="return_tokens"):
        ShardEmbedder(model_id="/there/is/none", return_tokens=True)
