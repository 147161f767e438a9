"""The page's client, and the last few embeddings that it received: a change of layer asks no server.

Held in memory alone, by their request, up to a number of bytes. A server that comes back with another model gets a new
client, and what was held of the old model is dropped.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final

from layertap._protocol.options import LengthOptions
from layertap.async_client import AsyncClient
from layertap.errors import FailedPreconditionError
from layertap.explore.files import Corpus, Held
from layertap.model_info import ModelInfo
from layertap.results.embedding import Embedding
from layertap.types import Pooling

_HELD_BYTES: Final = 512 << 20
_INFO_TIMEOUT_S: Final = 3.0


class Session:
    """Asks one server.

    Attributes:
        target: The server.
        client: What asks it.
        file: The file that the page was last given.
        corpus: The sentences in which neighbours are looked for.
    """

    def __init__(self, target: str, *, timeout_s: float) -> None:
        """Opens no connection yet; `timeout_s` is the deadline of each call, in seconds.

        Raises:
            InvalidArgumentError: if the target is wrong.
        """
        self.target = target
        self._timeout_s = timeout_s
        self.file: Corpus | None = None
        self.corpus: Held | None = None
        self._held: OrderedDict[object, tuple[Embedding, int]] = OrderedDict()
        self.client = self._open()

    async def info(self) -> ModelInfo:
        """Asks which model is served now."""
        try:
            return await self.client.model_info(timeout_s=_INFO_TIMEOUT_S)
        except FailedPreconditionError:  # The client is that of another model.
            await self.client.close()
            self.client = self._open()
            self._held.clear()
            self.corpus = None
            return await self.client.model_info(timeout_s=_INFO_TIMEOUT_S)

    async def layers(self, texts: Sequence[str], cut: LengthOptions) -> Embedding:
        """Returns all layers of texts, with their tokens."""
        return await self._embed(texts, cut, layers="all", return_tokens=True)

    async def pools(self, texts: Sequence[str], poolings: list[Pooling], cut: LengthOptions) -> Embedding:
        """Returns pooled vectors of texts."""
        return await self._embed(texts, cut, pooling=poolings)

    async def attentions(self, text: str, cut: LengthOptions) -> Embedding:
        """Returns the attention of all heads, with the tokens."""
        return await self._embed((text,), cut, attentions="all", return_tokens=True)

    async def _embed(self, texts: Sequence[str], cut: LengthOptions, **options: Any) -> Embedding:
        key = (tuple(texts), repr((cut, options)))
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key][0]
        client = self.client
        embedding = await client.embed(texts, **cut, **options)
        size = await asyncio.to_thread(_byte_count, embedding)
        if client is self.client and size <= _HELD_BYTES:
            self._held[key] = embedding, size
            while sum(held for _, held in self._held.values()) > _HELD_BYTES:
                self._held.popitem(last=False)
        return embedding

    def _open(self) -> AsyncClient:
        return AsyncClient(self.target, timeout_s=self._timeout_s)


def _byte_count(embedding: Embedding) -> int:
    return sum(getattr(column.values, "nbytes", 0) for column in embedding.columns())
