"""The vectors of a layertap server for LangChain: `LayertapEmbeddings`. Needs langchain-core."""

from __future__ import annotations

from typing import Unpack

import numpy as np
from langchain_core.embeddings import Embeddings

from layertap.async_client import AsyncClient
from layertap.client import Client
from layertap.sentence_transformers import EncodeOptions


class LayertapEmbeddings(Embeddings):  # type: ignore[misc]  # langchain_core is not installed where this is checked.
    """Sentence vectors as `Client.encode_document` and `Client.encode_query` make them, for vector stores and chains.

    Example:
        >>> store = InMemoryVectorStore(LayertapEmbeddings("127.0.0.1:50051"))  # doctest: +SKIP
    """

    def __init__(self, client: Client | str | None = None, **options: Unpack[EncodeOptions]) -> None:
        """Connects at the first call, not here.

        Args:
            client: A client, whose settings count, or the server as in `Client`. The asynchronous methods have a
                connection of their own with the same settings.
            options: Options of `Client.encode`, such as normalize_embeddings or truncate_dim.

        Raises:
            TypeError: if the client was made by from_channel.
        """
        self.client = client if isinstance(client, Client) else Client(client)
        self.async_client = AsyncClient.__new__(AsyncClient)
        self.async_client.__setstate__(self.client.__getstate__())
        self.options = options

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Returns a vector for each text that is searched."""
        return np.asarray(self.client.encode_document(texts, **self.options)).tolist()

    def embed_query(self, text: str) -> list[float]:
        """Returns the vector of a text that is searched for."""
        return np.asarray(self.client.encode_query(text, **self.options)).tolist()

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Returns a vector for each text that is searched."""
        return np.asarray(await self.async_client.encode_document(texts, **self.options)).tolist()

    async def aembed_query(self, text: str) -> list[float]:
        """Returns the vector of a text that is searched for."""
        return np.asarray(await self.async_client.encode_query(text, **self.options)).tolist()
