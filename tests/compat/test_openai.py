"""The clients of OpenAI's API against a server with `--http-port`: openai, langchain-openai and curl."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from langchain_openai import OpenAIEmbeddings

from layertap import Client

TEXTS = ["I love Paris", "", "Berlin is larger than Paris, and colder in winter " * 30, "東京は大きい"]
TOKEN = "alices-token-0123"


@pytest.fixture(scope="module")
def model(client: Client) -> str:
    return client.model_info().model_id


@pytest.fixture
def sync(openai_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=openai_url, api_key="none", max_retries=0) as client:
        yield client


def vectors_of(answer: Any) -> np.ndarray:
    assert [item.index for item in answer.data] == list(range(len(answer.data)))
    return np.array([item.embedding for item in answer.data], np.float32)


def test_the_vectors_are_those_of_encode(sync: openai.OpenAI, client: Client, model: str) -> None:
    wanted = client.encode(TEXTS)
    answer = sync.embeddings.create(model=model, input=TEXTS)  # As base64, which this client asks for by itself.
    assert np.array_equal(vectors_of(answer), wanted) and answer.model == model
    counts = client.tokenize(TEXTS, truncation="right", max_length=client.model_info().sentence_config.max_length)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == counts.token_counts.sum()
    answer = sync.embeddings.create(model=model, input=TEXTS, encoding_format="float", user="alice")
    assert np.array_equal(vectors_of(answer), wanted)
    assert np.array_equal(vectors_of(sync.embeddings.create(model=model, input=TEXTS[0]))[0], client.encode(TEXTS[0]))
    found = vectors_of(sync.embeddings.create(model=model, input=TEXTS, dimensions=100))
    assert np.array_equal(found, client.encode(TEXTS, truncate_dim=100, normalize_embeddings=True))
    many = [f"text {n}" for n in range(1000)]
    assert np.array_equal(vectors_of(sync.embeddings.create(model=model, input=many)), client.encode(many))


def test_the_async_client_sends_many_requests_at_once(openai_url: str, client: Client, model: str) -> None:
    texts = [[f"text {n}", f"another {n}"] for n in range(20)]

    async def run() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=openai_url, api_key="none", max_retries=0) as caller:
            return await asyncio.gather(*(caller.embeddings.create(model=model, input=pair) for pair in texts))

    for pair, answer in zip(texts, asyncio.run(run()), strict=True):
        assert np.array_equal(vectors_of(answer), client.encode(pair))


def test_models_are_listed(sync: openai.OpenAI, model: str) -> None:
    assert [one.id for one in sync.models.list()] == [model]
    assert sync.models.retrieve(model).owned_by == "layertap"


def test_errors_are_those_of_the_client(sync: openai.OpenAI, model: str) -> None:
    for kind, words, fields in (
        (openai.NotFoundError, model, {"model": "text-embedding-3-small", "input": "x"}),
        (openai.BadRequestError, "check_embedding_ctx_length=False", {"model": model, "input": [[1, 2, 3]]}),
        (openai.BadRequestError, "empty list", {"model": model, "input": []}),
        (openai.BadRequestError, "dimensions", {"model": model, "input": "x", "dimensions": 100_000}),
        (openai.BadRequestError, "characters", {"model": model, "input": "x" * 1_000_000}),
        (openai.APIStatusError, "bytes", {"model": model, "input": "x" * 10_000_000}),
        (
            openai.BadRequestError,
            "does not know",
            {"model": model, "input": "x", "extra_body": {"input_type": "query"}},
        ),
    ):
        with pytest.raises(kind, match=words) as caught:
            sync.embeddings.create(**fields)
        assert caught.value.status_code == (413 if words == "bytes" else 404 if words == model else 400)
        assert caught.value.request_id
    assert sync.embeddings.create(model=model, input="x").usage.prompt_tokens == 3


def test_tokens_are_asked_for_and_a_full_server_is_tried_again(guarded_url: str, client: Client, model: str) -> None:
    stranger = openai.OpenAI(base_url=guarded_url, api_key="another-token-0123")
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.embeddings.create(model=model, input="x")
    text = "Berlin is larger than Paris " * 50

    def embed(retries: int) -> Any:
        with openai.OpenAI(base_url=guarded_url, api_key=TOKEN, max_retries=retries) as caller:
            try:
                return caller.embeddings.create(model=model, input=[text] * 4)
            except openai.RateLimitError as exc:
                return exc

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        refused = [one for one in pool.map(embed, [0] * 8) if isinstance(one, openai.RateLimitError)]
        assert refused and all(one.response.headers["retry-after-ms"] == "500" for one in refused)
        # Only close: which of two ways to multiply is the faster is measured by each server at its start.
        assert all(np.allclose(vectors_of(one), client.encode(text), atol=1e-5) for one in pool.map(embed, [50] * 8))


def test_langchain_embeds_documents_and_queries(openai_url: str, client: Client, model: str) -> None:
    wanted = client.encode(TEXTS)
    options = {"base_url": openai_url, "api_key": "none", "model": model, "check_embedding_ctx_length": False}

    async def run() -> list[list[float]]:
        async with httpx.AsyncClient() as http:  # LangChain closes none.
            found = OpenAIEmbeddings(**options, http_async_client=http)
            return [*await found.aembed_documents(TEXTS), await found.aembed_query(TEXTS[0])]

    assert np.array_equal(np.array(asyncio.run(run()), np.float32), [*wanted, wanted[0]])
    with httpx.Client() as http:
        found = OpenAIEmbeddings(**options, http_client=http)
        assert np.array_equal(np.array(found.embed_documents(TEXTS), np.float32), wanted)
        assert np.array_equal(np.array(found.embed_query(TEXTS[0]), np.float32), wanted[0])


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(openai_url: str, client: Client, model: str) -> None:
    command = [
        "curl",
        "-sS",
        "--fail-with-body",
        f"{openai_url}/embeddings",
        "-H",
        "content-type: application/json",
        "-d",
    ]
    request = json.dumps({"model": model, "input": TEXTS})
    answer = json.loads(subprocess.run([*command, request], check=True, capture_output=True, timeout=60).stdout)
    assert np.array_equal([item["embedding"] for item in answer["data"]], client.encode(TEXTS))
    large = subprocess.run([*command, "@-"], input=b"x" * 20_000_000, capture_output=True, timeout=60)
    assert large.returncode == 22 and json.loads(large.stdout)["error"]["type"] == "invalid_request_error"
