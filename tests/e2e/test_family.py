"""A model of another type than BERT, with a Dense, on a server: both clients, every way to ask, OpenAI's API.

What each type computes is held against transformers in tests/model/test_family.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from support import BOUND, Server, family, open_client, running, worst
from support.openai_api import ask
from support.oracle import Oracle

INPUTS: list[Any] = ["I love Paris", "", ("a <pad> pair", "of texts"), ["some", "", "words"], "a long tale " * 5]
TEXTS = [item for item in INPUTS if isinstance(item, str)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = family.save("roberta", tmp_path_factory.mktemp("plain") / "roberta")
    torch.manual_seed(0)
    modules = [Transformer(str(made)), Pooling(32, pooling_mode=["cls", "mean"]), Dense(64, 24), Normalize()]
    saved = tmp_path_factory.mktemp("models") / "roberta"
    SentenceTransformer(modules=modules, device="cpu").save(str(saved), create_model_card=False)
    return saved


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    flags = ("--model-name", "roberta", "--http-port", "0", "--shared-memory-bytes", "64MiB")
    with running("--device", "cpu", "--model-id", str(folder), *flags) as started:
        yield started


@pytest.fixture(params=["auto", "off"], ids=["shared memory", "bytes"])
def client(request: pytest.FixtureRequest, kind: str, server: Server) -> Iterator[Any]:
    opened = open_client(kind, server.address, shared_memory=request.param)
    yield opened
    opened.close()


def test_every_way_to_ask_gives_what_transformers_computes(client: Any, folder: Path) -> None:
    oracle = Oracle.load(folder)
    whole = client.embed(INPUTS, layers="all", pooler_output=True)
    streamed = {one.index: one.embedding for one in client.embed_stream(INPUTS, layers="all", pooler_output=True)}
    by_layer = {
        (part.layer, text): rows
        for part in client.embed_layers(INPUTS)
        for text, rows in zip(part.texts, part.rows, strict=True)
    }
    for n, item in enumerate(INPUTS):
        layers, pooler_output = oracle.text(item)
        for layer, rows in enumerate(layers):
            assert worst(whole.ragged(layer)[n], rows) <= BOUND
            assert worst(streamed[n].ragged(layer)[0], rows) <= BOUND
            assert worst(by_layer[layer, n], rows) <= BOUND
        assert worst(whole.pooler_output[n], pooler_output) <= BOUND
        assert worst(streamed[n].pooler_output[0], pooler_output) <= BOUND


@pytest.mark.parametrize("count", [1, 30], ids=["one request", "a stream"])
def test_encode_is_that_of_sentence_transformers(client: Any, folder: Path, count: int) -> None:
    judge = SentenceTransformer(str(folder), device="cpu")
    for options in ({}, {"truncate_dim": 7, "normalize_embeddings": True}):
        assert worst(client.encode(TEXTS * count, **options), judge.encode(TEXTS * count, **options)) <= 1e-5
    rows = client.encode(TEXTS * count, output_value="token_embeddings")
    for own, wanted in zip(rows, judge.encode(TEXTS * count, output_value="token_embeddings"), strict=True):
        assert worst(own, wanted.numpy()) <= 1e-5


def test_openai_gives_the_vectors_of_encode_to_the_last_bit(client: Any, server: Server) -> None:
    for fields, options in (({}, {}), ({"dimensions": 5}, {"truncate_dim": 5, "normalize_embeddings": True})):
        reply = ask(server, {"model": "roberta", "input": TEXTS, **fields})
        assert reply.status == 200, reply
        vectors = np.array([item["embedding"] for item in reply.body["data"]], np.float32)
        assert np.array_equal(vectors, client.encode(TEXTS, **options))
    assert ask(server, {"model": "roberta", "input": TEXTS, "dimensions": 25}).status == 400
