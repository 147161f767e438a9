"""`encode` and prompts: equal to sentence-transformers, on the same folders, whatever they say; refused where not.

The oracle is the installed sentence-transformers. Folders are copies of the tiny model with other configurations.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tokenizers
from huggingface_hub.utils import filter_repo_objects
from sentence_transformers import SentenceTransformer
from support import Server, open_client, running
from support.sentence_folders import (
    MODULE,
    POOLING,
    QUERY,
    TRANSFORMER,
    modules,
    read,
    save_instructed,
    write,
)
from tokenizers import normalizers

from layertap import Client, FailedPreconditionError, InvalidArgumentError
from layertap._protocol.responses import ModelPin
from layertap.sentence_transformers import Encoding
from layertap_server.model import checkpoint

BOUND = 1e-5
SHORT = ["A guitar is played.", "", "漢字 and Ünïcode 😀", "Query"]
TEXTS = [*SHORT, "a long tale " * 300, "word " * 254, "word " * 255]
MANY = [f"number {n} " * (n % 5) for n in range(300)]


def same(found: Any, wanted: Any) -> None:
    """Fails unless arrays are of equal shape and dtype and nowhere further apart than the bound."""
    wanted = np.asarray(wanted)
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    assert np.abs(found - wanted).max(initial=0.0) <= BOUND


class Judge:
    """sentence-transformers with one model; it is asked the same only once."""

    def __init__(self, folder: Path) -> None:
        self.model = SentenceTransformer(str(folder), device="cpu")
        self._known: dict[str, Any] = {}

    def encode(self, given: Any, **options: Any) -> Any:
        name = repr((given, options))
        if name not in self._known:
            self._known[name] = self.model.encode(given, **options)
        return self._known[name]


@pytest.fixture(scope="module")
def real_judge(real_folder: Path) -> Judge:
    return Judge(real_folder)


@pytest.fixture(scope="module")
def instructed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_instructed(tiny_folder, tmp_path_factory.mktemp("models") / "instructed")


@pytest.fixture(scope="module")
def lowered(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that minds capitals and cuts at the left, behind do_lower_case; poolings by flags."""
    folder = tmp_path_factory.mktemp("models") / "lowered"
    shutil.copytree(tiny_folder, folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"do_lower_case": False, "truncation_side": "left", "tokenizer_class": "PreTrainedTokenizerFast"}
    return write(
        folder,
        tokenizer_config=settings,
        modules=modules(TRANSFORMER, POOLING),
        sentence_bert_config={"max_seq_length": 16, "do_lower_case": True},
        _1_Pooling__config={
            "word_embedding_dimension": 32,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_cls_token": True,
        },
    )


@pytest.fixture(scope="module")
def served(instructed: Path, lowered: Path) -> Iterator[dict[Path, Server]]:
    with (
        running("--device", "cpu", "--model-id", str(instructed)) as one,
        running("--device", "cpu", "--model-id", str(lowered)) as other,
    ):
        yield {instructed: one, lowered: other}


@pytest.fixture(scope="module")
def judges(instructed: Path, lowered: Path) -> dict[Path, Judge]:
    return {folder: Judge(folder) for folder in (instructed, lowered)}


@pytest.fixture(params=["instructed", "lowered"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def odd(kind: str, folder: Path, served: dict[Path, Server]) -> Iterator[Any]:
    """Each of the clients, connected to each of the odd models."""
    client = open_client(kind, served[folder].address)
    yield client
    client.close()


# The embedded model.


@pytest.mark.parametrize("given", ["a text", "", TEXTS, tuple(SHORT), np.array(SHORT), MANY, ["one"], []])
def test_encode_is_what_sentence_transformers_gives(real: Any, real_judge: Judge, given: Any) -> None:
    same(real.encode(given), real_judge.encode(given))


def test_encode_takes_any_iterable_of_str(real: Any, real_judge: Judge) -> None:
    for given in ((text for text in SHORT), pd.Series(SHORT), pa.array(SHORT)):
        same(real.encode(given), real_judge.encode(SHORT))


@pytest.mark.parametrize(
    "options",
    [
        {"normalize_embeddings": True},
        {"normalize_embeddings": False},
        {"truncate_dim": 64},
        {"truncate_dim": 64, "normalize_embeddings": True},
        {"truncate_dim": 100_000},
        {"batch_size": 3},
        {"prompt": "query: "},
        {"prompt": ""},
        {"prompt_name": "document"},
    ],
    ids=str,
)
def test_options_mean_the_same(real: Any, real_judge: Judge, options: dict[str, Any]) -> None:
    same(real.encode(TEXTS, **options), real_judge.encode(TEXTS, **options))


@pytest.mark.parametrize("options", [{}, {"truncate_dim": 7, "normalize_embeddings": True}, {"prompt": "query: "}])
def test_token_embeddings_are_the_same(real: Any, real_judge: Judge, options: dict[str, Any]) -> None:
    for given in (TEXTS, MANY[:40]):
        found = real.encode(given, output_value="token_embeddings", **options)
        wanted = real_judge.encode(given, output_value="token_embeddings", **options)
        assert isinstance(found, list) and len(found) == len(wanted)
        for rows, others in zip(found, wanted, strict=True):
            same(rows, others.numpy())
    same(
        real.encode("one text", output_value="token_embeddings"),
        real_judge.encode("one text", output_value="token_embeddings").numpy(),
    )
    assert real.encode([], output_value="token_embeddings") == []


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
@pytest.mark.parametrize("output_value", ["sentence_embedding", "token_embeddings"])
def test_precisions_are_the_same(
    real: Any, real_judge: Judge, precision: str, output_value: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    options = {"precision": precision, "output_value": output_value}
    found, wanted = (one.encode(MANY[1:60], **options) for one in (real, real_judge))
    assert len(found) == len(wanted)
    for row, other in zip(found, map(np.asarray, wanted), strict=True):
        assert (row.shape, row.dtype) == (other.shape, other.dtype)
        if precision.endswith("binary"):
            apart = np.unpackbits(row.view(np.uint8) ^ other.view(np.uint8)).mean()
        else:
            assert np.abs(row.astype(int) - other).max() <= 1  # A float at the edge of a step may be on either side.
            apart = (row != other).mean()
        assert apart <= 0.01


def test_one_text_in_bits_is_one_row(real: Any, real_judge: Judge) -> None:
    found, wanted = (one.encode("a text", precision="ubinary") for one in (real, real_judge))
    assert found.shape == wanted.shape == (48,) and found.dtype == wanted.dtype


def test_a_progress_bar_counts_the_texts(real: Any, capsys: pytest.CaptureFixture[str]) -> None:
    real.encode(MANY[:50], show_progress_bar=True)
    assert "50/50" in capsys.readouterr().err
    real.encode(MANY[:50])
    assert capsys.readouterr().err == ""


def test_without_a_configuration_it_is_the_mean(tiny: Any, tiny_folder: Path) -> None:
    judge = Judge(tiny_folder)
    same(tiny.encode(TEXTS), judge.encode(TEXTS))
    config = tiny.model_info().sentence_config
    assert (config.poolings, config.normalize, config.unsupported) == (("mean",), False, None)
    assert config.max_length == judge.model.max_seq_length


# Other folders.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prompt": ""},
        {"prompt": QUERY},
        {"prompt": "Is it so? "},
        {"prompt_name": "document"},
        {"truncate_dim": 20, "normalize_embeddings": True},
        {"output_value": "token_embeddings"},
    ],
    ids=str,
)
def test_what_a_folder_says_is_done(odd: Any, folder: Path, judges: dict[Path, Judge], options: dict[str, Any]) -> None:
    for given in (TEXTS, MANY[:40]):
        found, wanted = (one.encode(given, **options) for one in (odd, judges[folder]))
        for row, other in zip(found, wanted, strict=True):
            same(row, other)


@pytest.mark.parametrize("name", ["query", "passage", "long"])
def test_prompts_of_the_folder_are_known_by_name(
    kind: str,
    name: str,
    instructed: Path,
    served: dict[Path, Server],
    judges: dict[Path, Judge],
) -> None:
    client = open_client(kind, served[instructed].address)
    for given in (TEXTS, [("A guitar is played.", "Who plays?"), ("", "one")]):
        same(client.encode(given, prompt_name=name), judges[instructed].encode(given, prompt_name=name))
    client.close()


def test_the_model_info_tells_what_the_folder_says(instructed: Path, lowered: Path, served: dict[Path, Server]) -> None:
    found = {}
    for folder, server in served.items():
        with Client(server.address) as client:
            found[folder] = client.model_info().sentence_config
    one, other = found[instructed], found[lowered]
    assert one.poolings == ("cls", "max", "mean", "mean_sqrt_len", "last")
    assert (one.normalize, one.truncate_dim, one.max_length, one.include_prompt) == (True, 150, 24, False)
    assert one.prompts == {"query": QUERY, "document": "", "passage": "passage: ", "long": "long " * 40}
    assert (one.default_prompt_name, one.truncation, one.lower_case, one.unsupported) == ("query", "right", False, None)
    assert (other.poolings, other.normalize, other.truncate_dim) == (("cls", "mean"), False, None)
    assert (other.max_length, other.truncation, other.lower_case) == (16, "left", True)
    assert (other.default_prompt_name, other.include_prompt) == (None, True)


def test_a_model_with_other_modules_is_served_but_does_not_encode(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    shutil.copytree(tiny_folder, folder)
    write(folder, modules=modules(TRANSFORMER, POOLING, {"path": "2_Dense", "type": MODULE + "Dense"}))
    with running("--device", "cpu", "--model-id", str(folder)) as server, Client(server.address) as client:
        for output_value in ("sentence_embedding", "token_embeddings"):
            with pytest.raises(FailedPreconditionError, match="Dense"):
                client.encode("a text", output_value=output_value)
        assert client.embed("a text", pooling="mean").pooled.shape == (1, 32)
        assert b"Dense" in server.log


# What encode refuses.


@pytest.mark.parametrize(
    ("sentences", "options", "message"),
    [
        (5, {}, "inputs is of type int"),
        (["fine", ["words"]], {}, r"inputs\[1\] is words; encode takes only str"),
        (["fine", [101, 102]], {}, r"inputs\[1\] is token_ids; encode takes only str"),
        (["fine", None], {}, r"inputs\[1\] is missing"),
        (["fine", "\ud800"], {}, r"inputs\[1\] has a lone surrogate"),
        ("a", {"output_value": "tokens"}, "output_value is 'tokens'"),
        ("a", {"precision": "int4"}, "precision is 'int4'"),
        ("a", {"precision": "int8"}, "one embedding alone has no ranges"),
        ("a", {"batch_size": 0}, "batch_size is 0"),
        ("a", {"truncate_dim": 0}, "truncate_dim is 0"),
        (["fine", "x" * 100_001], {}, r"inputs\[1\] has 100001 characters|item 1 has 100001 characters"),
    ],
)
def test_what_cannot_be_encoded_is_refused(tiny: Any, sentences: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        tiny.encode(sentences, **options)
    assert tiny.encode("a").shape == (32,)


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.encode(["a"]),
        lambda client: client.encode(["a"] * 40),
        lambda client: client.model_info(),
        lambda client: client.embed("a", pooling="mean"),
        lambda client: client.embed("a"),
        lambda client: list(client.embed_layers("a")),
        lambda client: list(client.embed_stream(["a"])),
    ],
)
def test_a_client_of_one_model_takes_no_answer_of_another(
    kind: str, tiny_server: Server, ask: Callable[[Any], Any]
) -> None:
    client = open_client(kind, tiny_server.address, fingerprint="0" * 64)
    for _ in range(2):
        with pytest.raises(FailedPreconditionError, match=r"another model.*'000000000000'"):
            ask(client)
    client.close()


def test_a_batch_size_bounds_what_is_sent_at_once(tiny_server: Server) -> None:
    with Client(tiny_server.address) as client:
        info = client.model_info()
    options = {"prompt_name": None, "prompt": None, "output_value": "sentence_embedding", "precision": "float32"}
    options |= {"normalize_embeddings": None, "truncate_dim": None}
    encoding = Encoding(MANY, info, batch_size=7, **options)
    state = encoding.state(ModelPin())
    for text in encoding.texts[:20]:
        state.offer(text)
    assert [len(state.take(4096)) for _ in range(3)] == [7, 7, 6]
    assert Encoding(MANY[:8], info, batch_size=7, **options).request() is None
    assert Encoding(MANY[:7], info, batch_size=7, **options).request() is not None


def test_what_the_installed_sentence_transformers_writes_is_read(
    tmp_path: Path, real_judge: Judge, real_folder: Path
) -> None:
    real_judge.model.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    saved = read(tmp_path / "saved")
    # Its length has moved to the tokenizer, whose word for it is an argument here.
    assert dataclasses.replace(saved, max_length=256) == read(real_folder)


def test_hub_downloads_have_all_that_is_read() -> None:
    names = ["modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json"]
    assert list(filter_repo_objects(names, allow_patterns=checkpoint._HUB_FILES)) == names
