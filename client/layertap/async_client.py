"""`AsyncClient`: the twin of `Client` for asyncio, to be shared by the tasks of one event loop.

Every method has the same name, arguments and errors; it awaits, and every iterator is an `async for`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

from layertap._encode import AsyncSentenceClient
from layertap._protocol import requests, responses
from layertap._protocol.inputs import InputItem, Inputs, check_items
from layertap._protocol.option_names import check_names
from layertap._protocol.options import (
    EmbedOptions,
    LayerOptions,
    OnError,
    SpanOptions,
    TokenizeOptions,
    raises,
)
from layertap._protocol.stream_state import StreamState
from layertap._transport.readiness import PASSING, Readiness
from layertap._transport.settings import DEFAULT_TIMEOUT_S, Metadata
from layertap.model_info import ModelInfo
from layertap.results.embedding import Embedding
from layertap.results.streamed import LayerRows, StreamResult
from layertap.results.tokens import Tokens

if TYPE_CHECKING:
    import grpc
    import grpc.aio

Items = Iterable[InputItem] | AsyncIterable[InputItem]


class AsyncClient(AsyncSentenceClient):
    """The same as `Client` for asyncio: every method awaits, every iterator is an `async for`.

    Example:
        >>> async with AsyncClient("127.0.0.1:50051") as client:
        ...     embedding = await client.embed("I love Paris")
    """

    @classmethod
    def from_channel(cls, channel: grpc.aio.Channel, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Self:
        """See `Client.from_channel`."""
        import grpc.aio

        return cls._from_channel(channel, grpc.aio.Channel, timeout_s)

    async def tokenize(
        self,
        inputs: Inputs,
        *,
        timeout_s: float | None = None,
        metadata: Metadata = (),
        **options: Unpack[TokenizeOptions],
    ) -> Tokens:
        """See `Client.tokenize`."""
        check_names(options, TokenizeOptions)
        call, answers, request_id = self._connection.call(timeout_s, metadata), [], None
        for request in requests.tokenize(inputs, **options):
            reply = await self._transport.unary(request, call)
            responses.check_tokens(request.request, reply.message, self._transport.pin)
            answers.append(reply.message)
            request_id = reply.request_id
        return responses.read_tokens(answers, request_id)

    async def decode(
        self,
        ids: requests.TokenRows,
        *,
        skip_special_tokens: bool = True,
        timeout_s: float | None = None,
        metadata: Metadata = (),
    ) -> list[str]:
        """See `Client.decode`."""
        request = requests.decode(ids, skip_special_tokens=skip_special_tokens)
        reply = await self._transport.unary(request, self._connection.call(timeout_s, metadata))
        return responses.read_texts(request.request, reply.message, self._transport.pin)

    async def embed(
        self,
        inputs: Inputs,
        *,
        timeout_s: float | None = None,
        metadata: Metadata = (),
        **options: Unpack[SpanOptions],
    ) -> Embedding:
        """See `Client.embed`."""
        return await self._transport.embed(requests.embed(inputs, options), self._connection.call(timeout_s, metadata))

    def embed_layers(
        self,
        inputs: Inputs,
        *,
        timeout_s: float | None = None,
        metadata: Metadata = (),
        **options: Unpack[LayerOptions],
    ) -> AsyncGenerator[LayerRows, None]:
        """See `Client.embed_layers`."""
        request = requests.embed_layers(inputs, options)
        return self._transport.embed_layers(request, self._connection.call(timeout_s, metadata))

    def embed_stream(
        self,
        inputs: Items,
        *,
        ordered: bool = True,
        on_error: OnError = "return",
        item_timeout_s: float | None = None,
        reconnect_timeout_s: float | None = None,
        metadata: Metadata = (),
        **options: Unpack[EmbedOptions],
    ) -> AsyncGenerator[StreamResult, None]:
        """See `Client.embed_stream`; `inputs` may also be an async iterable."""
        state = StreamState(requests.embed_stream(options), ordered=ordered, pin=self._transport.pin)
        if not isinstance(inputs, AsyncIterable):
            check_items(inputs)
        settings = self._connection.stream(item_timeout_s, reconnect_timeout_s, metadata, raising=raises(on_error))
        return self._transport.stream(state, inputs, settings)

    async def wait_until_ready(self, *, timeout_s: float | None = None, metadata: Metadata = ()) -> None:
        """See `Client.wait_until_ready`."""
        import asyncio  # Here, for it takes a fifth of the import of the package.

        call = self._connection.call(timeout_s, metadata)
        readiness = Readiness(call.timeout_s)
        while True:
            try:
                await self.model_info(timeout_s=readiness.left_s, metadata=metadata)
                return
            except PASSING as exc:
                await asyncio.sleep(readiness.pause_s(exc))

    async def model_info(self, *, timeout_s: float | None = None, metadata: Metadata = ()) -> ModelInfo:
        """See `Client.model_info`."""
        return await self._transport.model_info(self._connection.call(timeout_s, metadata))

    async def close(self) -> None:
        """See `Client.close`."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        """Returns itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the connection."""
        await self.close()
