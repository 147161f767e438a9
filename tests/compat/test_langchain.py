"""`LayertapEmbeddings` with the real LangChain."""

from __future__ import annotations

import asyncio
import copy
import pickle

import pytest
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore

from layertap import Client
from layertap.integrations.langchain import LayertapEmbeddings
from layertap_server.testing import ServerProcess

TEXTS = ["Berlin", "a bowl of soup", "", "Ὀδύσσεια"] * 20


@pytest.fixture(scope="module")
def embeddings(client: Client) -> LayertapEmbeddings:
    return LayertapEmbeddings(client)


def test_vectors_are_those_of_encode(embeddings: LayertapEmbeddings, client: Client) -> None:
    assert isinstance(embeddings, Embeddings)
    expected = client.encode(TEXTS).tolist()
    assert embeddings.embed_documents(TEXTS) == expected
    assert embeddings.embed_query(TEXTS[1]) == expected[1]
    assert embeddings.embed_documents([]) == []


def test_asynchronous_methods_return_the_same_in_any_loop(embeddings: LayertapEmbeddings, client: Client) -> None:
    expected = client.encode(TEXTS).tolist()

    async def both() -> list[object]:
        return await asyncio.gather(embeddings.aembed_documents(TEXTS), embeddings.aembed_query(TEXTS[0]))

    for _ in range(2):
        assert asyncio.run(both()) == [expected, expected[0]]


def test_options_and_targets_are_those_of_the_client(server: ServerProcess, client: Client) -> None:
    short = LayertapEmbeddings(server.address, truncate_dim=16, normalize_embeddings=True)
    expected = client.encode(TEXTS[:2], truncate_dim=16, normalize_embeddings=True).tolist()
    assert short.embed_documents(TEXTS[:2]) == expected
    for other in (copy.deepcopy(short), pickle.loads(pickle.dumps(short))):
        assert other.client == short.client and other.embed_query(TEXTS[0]) == expected[0]


def test_a_vector_store_finds_what_is_alike(embeddings: LayertapEmbeddings) -> None:
    store = InMemoryVectorStore.from_texts(["a dog barks", "the stock market fell", "she plays the violin"], embeddings)
    assert store.similarity_search("shares lost value", k=1)[0].page_content == "the stock market fell"
    assert asyncio.run(store.asimilarity_search("a puppy", k=1))[0].page_content == "a dog barks"
