"""What `encode`, `encode_query` and `encode_document` take: as sentence-transformers, or a TypeError that helps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from support import open_client, running

from layertap import InvalidArgumentError

BOUND = 1e-5
TEXTS = ["A guitar is played.", "", "Who plays?"]
PAIRS = [("A guitar is played.", "Who plays?"), ("", "one"), ("long " * 300, "short")]
PROMPTS = {"query": "query: ", "passage": "passage: "}


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "prompted"
    shutil.copytree(tiny_folder, made)
    module = "sentence_transformers.models."
    parts = [("", "Transformer"), ("1_Pooling", "Pooling")]
    listed = [{"idx": n, "name": str(n), "path": path, "type": module + name} for n, (path, name) in enumerate(parts)]
    (made / "modules.json").write_text(json.dumps(listed))
    (made / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, "do_lower_case": False}))
    (made / "config_sentence_transformers.json").write_text(json.dumps({"prompts": PROMPTS}))
    (made / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (made / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return made


@pytest.fixture(scope="module")
def judge(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Any]:
    with running("--device", "cpu", "--model-id", str(folder)) as started:
        yield started


@pytest.fixture
def client(kind: str, server: Any) -> Iterator[Any]:
    opened = open_client(kind, server.address)
    yield opened
    opened.close()


def same(found: Any, wanted: Any) -> None:
    wanted = np.asarray(wanted)
    assert (type(found), found.shape, found.dtype) == (type(wanted), wanted.shape, wanted.dtype)
    assert np.abs(found - wanted).max() <= BOUND


@pytest.mark.parametrize("method", ["encode", "encode_query", "encode_document"])
@pytest.mark.parametrize(
    ("given", "options"),
    [
        ((), {}),
        (("query",), {}),
        ((None, "Is it so? "), {}),
        ((), {"convert_to_numpy": True, "convert_to_tensor": False, "device": None, "normalize_embeddings": True}),
        ((), {"prompt": "mine: ", "prompt_name": "query"}),
        ((), {"prompt": ""}),
    ],
    ids=str,
)
def test_arguments_mean_the_same(
    client: Any, judge: SentenceTransformer, method: str, given: Any, options: dict[str, Any]
) -> None:
    same(getattr(client, method)(TEXTS, *given, **options), getattr(judge, method)(TEXTS, *given, **options))


def test_arguments_have_the_same_order(client: Any, judge: SentenceTransformer) -> None:
    given = (TEXTS, None, "mine: ", 2, False, "sentence_embedding", "ubinary")
    assert np.array_equal(client.encode(*given), judge.encode(*given))


def test_the_texts_may_be_named(client: Any, judge: SentenceTransformer) -> None:
    same(client.encode(sentences=TEXTS), judge.encode(TEXTS))


def test_pairs_are_the_same(client: Any, judge: SentenceTransformer) -> None:
    same(client.encode(PAIRS), judge.encode(PAIRS))
    many = PAIRS * 20
    same(client.encode(many), judge.encode(many))
    for options in ({"prompt_name": "query"}, {"prompt": "Is it so? "}):
        same(client.encode(PAIRS, **options), judge.encode(PAIRS, **options))
        same(client.encode(many, **options), judge.encode(many, **options))
    same(client.encode_query(PAIRS), judge.encode_query(PAIRS))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"convert_to_tensor": True}, "torch.from_numpy"),
        ({"convert_to_numpy": False}, "torch.from_numpy"),
        ({"device": "cuda"}, "no device: the server computes"),
        ({"pool": {}}, "no pool"),
        ({"chunk_size": 5}, "no chunk_size"),
        ({"output_value": None}, "ask embed"),
        ({"inputs": ["a"]}, "first argument"),
        ({"unheard_of": 1}, "unexpected keyword argument 'unheard_of'; the options are .*prompt_name, .*truncate_dim"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_a_type_error_that_says_what_to_do(
    client: Any, options: dict[str, Any], named: str
) -> None:
    texts = () if "inputs" in options else (TEXTS,)
    with pytest.raises(TypeError, match=named):
        client.encode(*texts, **options)


def test_embed_takes_a_prompt_or_its_name(client: Any) -> None:
    for ask in (client.embed, lambda *given, **options: list(client.embed_stream(*given, **options))):
        with pytest.raises(InvalidArgumentError, match="both prompt and prompt_name"):
            ask(TEXTS, prompt="a", prompt_name="query")
