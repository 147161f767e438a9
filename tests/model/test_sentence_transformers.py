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
from tokenizers import normalizers

from layertap import Client, FailedPreconditionError, InvalidArgumentError, TokenIds
from layertap._protocol.responses import ModelPin
from layertap.sentence_transformers import Encoding
from layertap_server.model import checkpoint, sentence_modules
from layertap_server.model import sentence_config as sentences
from layertap_server.types import Strategy

BOUND = 1e-5
SHORT = ["A guitar is played.", "", "漢字 and Ünïcode 😀", "Query"]
TEXTS = [*SHORT, "a long tale " * 300, "word " * 254, "word " * 255]
MANY = [f"number {n} " * (n % 5) for n in range(300)]

QUERY = "Represent the query, please: "
QUERY_WORDS = ("Represent", "the", "query", ",", "please", ":")
POOLINGS = ["cls", "max", "mean", "mean_sqrt_len_tokens", "lasttoken"]
MODULE = "sentence_transformers.models."
TRANSFORMER = {"path": "", "type": MODULE + "Transformer"}
POOLING = {"path": "1_Pooling", "type": MODULE + "Pooling"}
NORMALIZE = {"path": "2_Normalize", "type": MODULE + "Normalize"}


def same(found: Any, wanted: Any) -> None:
    """Fails unless arrays are of equal shape and dtype and nowhere further apart than the bound."""
    wanted = np.asarray(wanted)
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    assert np.abs(found - wanted).max(initial=0.0) <= BOUND


def write(folder: Path, **files: Any) -> Path:
    """Writes JSON files, `1_Pooling__config` as 1_Pooling/config.json."""
    for name, contents in files.items():
        path = folder / (name.removeprefix("_").replace("__", "/") + ".json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(contents))
    return folder


def modules(*given: dict[str, str]) -> list[dict[str, Any]]:
    return [{"idx": n, "name": str(n), **one} for n, one in enumerate(given)]


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
    """All poolings joined, without the prompt; normalized, then cut; a default prompt; a low length."""
    folder = tmp_path_factory.mktemp("models") / "instructed"
    shutil.copytree(tiny_folder, folder)
    return write(
        folder,
        modules=modules(TRANSFORMER, POOLING, NORMALIZE),
        sentence_bert_config={"max_seq_length": 24, "do_lower_case": False},
        config_sentence_transformers={
            "prompts": {"query": QUERY, "passage": "passage: ", "long": "long " * 40},
            "default_prompt_name": "query",
            "truncate_dim": 150,
        },
        _1_Pooling__config={"embedding_dimension": 32, "pooling_mode": POOLINGS, "include_prompt": False},
    )


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


# Prompts of the other methods.


def vectors(client: Any, method: str, texts: list[str], **options: Any) -> np.ndarray:
    """Returns the last layer's first row of each text, by any of the three methods."""
    if method == "embed":
        return client.embed(texts, **options).last_hidden_state[:, 0]
    if method == "embed_layers":
        parts = list(client.embed_layers(texts, layers=[-1], **options))
        found = {text: rows[0] for part in parts for text, rows in zip(part.texts, part.rows, strict=True)}
        return np.stack([found[n] for n in range(len(texts))])
    return np.stack([one.embedding.last_hidden_state[0, 0] for one in client.embed_stream(texts, **options)])


@pytest.mark.parametrize("method", ["embed", "embed_layers", "embed_stream"])
def test_a_prompt_is_as_if_it_stood_before_each_text(tiny: Any, method: str) -> None:
    found = vectors(tiny, method, SHORT, prompt="query: ")
    same(found, vectors(tiny, method, ["query: " + text for text in SHORT]))
    assert np.abs(found - vectors(tiny, method, SHORT)).max() > 0.01
    same(vectors(tiny, method, SHORT, prompt_name="query"), vectors(tiny, method, SHORT))


@pytest.mark.parametrize("method", ["embed", "embed_stream"])
def test_words_of_a_named_prompt_are_strings_too(
    kind: str, method: str, instructed: Path, served: dict[Path, Server]
) -> None:
    client = open_client(kind, served[instructed].address)
    for options in ({"prompt_name": "query"}, {"prompt": QUERY}):
        for text, own in (("I love Paris", ("I", "love", "Paris")), (("I love", "Rome"), ("I", "love", "Rome"))):
            found = getattr(client, method)([text], words="mean", **options)
            words = found.words if method == "embed" else next(iter(found)).embedding.words
            assert words.strings == ((*QUERY_WORDS, *own),)
    client.close()


def test_tokens_are_those_of_the_prompt_too(tiny: Any) -> None:
    tokens = tiny.embed("Paris", prompt="to ", return_tokens=True).tokens
    assert tokens.tokens == [["[CLS]", "to", "paris", "[SEP]"]]
    assert tokens.offset_mapping[0, 2].tolist() == [3, 8]


@pytest.mark.parametrize(
    ("item", "called"),
    [
        (["some", "words"], "words"),
        ([101, 102], "token ids"),
        (TokenIds([101]), "token ids"),
    ],
)
def test_words_and_token_ids_take_no_prompt(tiny: Any, item: Any, called: str) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"inputs\[1\] is {called}"):
        tiny.embed(["fine", item], prompt="query: ")
    good, bad = tiny.embed_stream(["fine", item], prompt="query: ")
    assert good.error is None and f"item 1 is {called}" in str(bad.error)
    assert len(tiny.embed(["fine", item], prompt="")) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_name": "secret"}, "has document, query"),
        ({"prompt": "a" * 10_001}, "10001 characters, the most is 10000"),
        ({"prompt": 5}, "prompt is of type int"),
        ({"prompt_name": "\ud800"}, "lone surrogate"),
    ],
    ids=str,
)
def test_prompts_that_cannot_be_are_refused(tiny: Any, options: dict[str, Any], message: str) -> None:
    for ask in (
        lambda: tiny.embed("a text", **options),
        lambda: list(tiny.embed_stream(["a text"], **options)),
        lambda: tiny.encode("a text", **options),
    ):
        with pytest.raises(InvalidArgumentError, match=message) as caught:
            ask()
        assert "secret" not in str(caught.value)


def test_a_text_that_is_all_prompt_has_nothing_to_pool(kind: str, instructed: Path, served: dict[Path, Server]) -> None:
    client = open_client(kind, served[instructed].address)
    # A prompt is counted by itself, and this one has more pieces than it has together with the text.
    alone, together = client.tokenize(["unknow", "unknown"]).token_counts.tolist()
    assert alone - 1 >= together
    for strategy in ("mean", "cls", "last"):
        with pytest.raises(InvalidArgumentError, match=r"inputs\[0\] has nothing to pool over"):
            client.embed(["n"], prompt="unknow", pooling=strategy)
    client.close()


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


# What a folder says.


def read(folder: Path) -> sentences.SentenceConfig:
    return sentences.read(folder, hidden_size=32, max_length=600, position_count=512, truncation="right")


def test_without_modules_nothing_else_is_read(tmp_path: Path) -> None:
    write(
        tmp_path,
        sentence_bert_config={"max_seq_length": 9},
        config_sentence_transformers={"prompts": {"query": "q: "}},
        _1_Pooling__config={"pooling_mode": "cls"},
    )
    assert read(tmp_path) == sentences.SentenceConfig(max_length=512)


@pytest.mark.parametrize(
    ("pooling", "strategies"),
    [
        ({}, (Strategy.MEAN,)),
        ({"pooling_mode": "lasttoken"}, (Strategy.LAST,)),
        ({"pooling_mode": ["mean", "cls"]}, (Strategy.MEAN, Strategy.CLS)),
        ({"pooling_mode": "max", "pooling_mode_mean_tokens": True}, (Strategy.MAX,)),
        ({"pooling_mode_mean_tokens": False}, (Strategy.MEAN,)),
        ({"pooling_mode_lasttoken": True, "pooling_mode_max_tokens": True}, (Strategy.MAX, Strategy.LAST)),
    ],
)
def test_poolings_by_name_and_by_flag(tmp_path: Path, pooling: Any, strategies: tuple[Strategy, ...]) -> None:
    write(tmp_path, modules=modules(TRANSFORMER, POOLING), _1_Pooling__config=pooling)
    found = read(tmp_path)
    assert (found.strategies, found.unsupported) == (strategies, "")


def test_what_the_installed_sentence_transformers_writes_is_read(
    tmp_path: Path, real_judge: Judge, real_folder: Path
) -> None:
    real_judge.model.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    saved = read(tmp_path / "saved")
    # Its length has moved to the tokenizer, whose word for it is an argument here.
    assert dataclasses.replace(saved, max_length=256) == read(real_folder)


UNSUPPORTED = {
    "Dense": {"modules": modules(TRANSFORMER, POOLING, {"path": "2", "type": MODULE + "Dense"})},
    "custom.Thing": {"modules": modules(TRANSFORMER, {"path": "1", "type": "custom.Thing"})},
    "no Pooling": {"modules": modules(TRANSFORMER)},
    "module Normalize: 2_Normalize/config.json works on the vector before there is one": {
        "modules": modules(TRANSFORMER, NORMALIZE, POOLING)
    },
    "no module Transformer at place 0": {"modules": modules(TRANSFORMER | {"path": "0_BERT"}, POOLING)},
    "not the model's own": {"modules": modules(TRANSFORMER, POOLING | {"path": "../1_Pooling"})},
    "names a folder that": {"modules": modules(TRANSFORMER, POOLING | {"path": "1_\0Pooling"})},
    "modules.json cannot be read": {"modules": {"no": "list"}},
    "weightedmean": {"_1_Pooling__config": {"pooling_mode_weightedmean_tokens": True}},
    "on token rows after they are pooled": {"_2_Normalize__config": {"module_input_name": "token_embeddings"}},
    "sets processing_kwargs": {"sentence_bert_config": {"processing_kwargs": {"text": {"max_length": 5}}}},
    "sets transformer_task": {"sentence_bert_config": {"transformer_task": "fill-mask"}},
    "max_seq_length": {"sentence_bert_config": {"max_seq_length": "256"}},
    "model_type SparseEncoder": {"config_sentence_transformers": {"model_type": "SparseEncoder"}},
    "default_prompt_name": {"config_sentence_transformers": {"default_prompt_name": "nobody"}},
    "no strings": {"config_sentence_transformers": {"prompts": {"query": 5}}},
    "truncate_dim": {"config_sentence_transformers": {"truncate_dim": 0}},
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_what_cannot_be_done_is_named(tmp_path: Path, reason: str) -> None:
    write(tmp_path, **{"modules": modules(TRANSFORMER, POOLING, NORMALIZE)} | UNSUPPORTED[reason])
    assert reason in read(tmp_path).unsupported
    (tmp_path / "modules.json").write_bytes(b"\xff")
    assert "modules.json cannot be read" in read(tmp_path).unsupported


def test_what_a_folder_calls_its_modules_makes_no_endless_error(tmp_path: Path) -> None:
    write(tmp_path, modules=modules(TRANSFORMER, {"path": "1", "type": "a\nb" * 1000}))
    found = read(tmp_path).unsupported
    assert len(found) < 1100 and found.isprintable()


def test_all_that_a_folder_says_is_in_the_fingerprint_and_no_reason_is() -> None:
    one = sentences.SentenceConfig(max_length=256)
    changed = {
        "max_length": 128,
        "truncation": "left",
        "strategies": (Strategy.CLS,),
        "normalize": True,
        "dimensions": 5,
        "lower_case": True,
        "prompts": {"query": "q: "},
        "default_prompt_name": "query",
        "include_prompt": False,
        "token_modules": (sentence_modules.Normalize(of_tokens=True),),
        "vector_modules": (
            sentence_modules.Dense(
                of_tokens=False,
                in_size=32,
                out_size=4,
                has_bias=True,
                activation="Tanh",
                has_residual=False,
                weights=Path("x"),
                digest="0",
            ),
        ),
    }
    assert {field.name for field in dataclasses.fields(one)} == {*changed, "unsupported"}
    others = [dataclasses.replace(one, **{name: value}).description for name, value in changed.items()]
    assert len({one.description, *others}) == len(changed) + 1
    assert dataclasses.replace(one, unsupported="a reason").description == one.description


def test_hub_downloads_have_all_that_is_read() -> None:
    names = ["modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json"]
    assert list(filter_repo_objects(names, allow_patterns=checkpoint._HUB_FILES)) == names
