"""`AsyncClient`: the twin of `Client` for asyncio, to be shared by the tasks of one event loop.

Every method has the same name, arguments and errors; it awaits, and every iterator is an `async for`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import grpc
import grpc.aio
import numpy.typing as npt

from layertap import progress
from layertap._protocol import requests as calls
from layertap._protocol.assembler import LayerAssembler
from layertap._protocol.inputs import Inputs, check_items
from layertap._protocol.options import EmbedOptions, LayerOptions, OnError, TokenizeOptions, check_names, raises
from layertap._protocol.stream_state import StreamLedger
from layertap._shared_memory.mapping import SharedMemory
from layertap._transport.embed_stream import Items, run_stream
from layertap._transport.settings import DEFAULT_RETRIES, DEFAULT_TIMEOUT_S, TLS, Connection, Option, settle
from layertap._transport.transport import AsyncLink
from layertap.errors import LayertapError
from layertap.quantization import Precision
from layertap.results.embedding import Embedding, LayerRows, StreamResult
from layertap.results.tokens import Tokens
from layertap.sentence_transformers import (
    EncodeOptions,
    Encoding,
    OutputValue,
    Sentences,
    TaskOptions,
    check_options,
)
from layertap.types import ModelInfo


class AsyncClient:
    """The same as `Client` for asyncio: every method awaits, every iterator is an `async for`.

    Example:
        >>> async with AsyncClient("127.0.0.1:50051") as client:
        ...     embedding = await client.embed("I love Paris")
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        shared_memory: bool = False,
        tls: TLS | bool | None = None,
        token: str | None = None,
        retries: int = DEFAULT_RETRIES,
        options: Sequence[Option] = (),
        timeout_s: float | None = None,
    ) -> None:
        """See `Client`."""
        connection = settle(target, tls=tls, token=token, retries=retries, options=options, timeout_s=timeout_s)
        self._set_up(connection, shared_memory, None)

    @classmethod
    def from_channel(cls, channel: grpc.aio.Channel, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Self:
        """See `Client.from_channel`; this one has `embed_stream` too, over the given channel."""
        client = cls.__new__(cls)
        client._set_up(Connection(target="the given channel", timeout_s=timeout_s), False, channel)
        return client

    def _set_up(self, connection: Connection, shared_memory: bool, channel: grpc.aio.Channel | None) -> None:
        self.target = connection.target
        self.shared_memory = SharedMemory(wanted=shared_memory)
        self._link = AsyncLink(connection, self.shared_memory, channel)
        self._model: ModelInfo | None = None

    async def tokenize(
        self,
        inputs: Inputs,
        *,
        timeout_s: float | None = None,
        **options: Unpack[TokenizeOptions],
    ) -> Tokens:
        """See `Client.tokenize`."""
        check_names(options, TokenizeOptions)
        requests = calls.tokenize(inputs, **options)
        return calls.read_tokens([await self._link.unary(request, timeout_s) for request in requests])

    async def decode(
        self,
        ids: calls.TokenRows,
        *,
        skip_special_tokens: bool = True,
        timeout_s: float | None = None,
    ) -> list[str]:
        """See `Client.decode`."""
        request = calls.decode(ids, skip_special_tokens=skip_special_tokens)
        return list((await self._link.unary(request, timeout_s)).texts)

    async def embed(
        self,
        inputs: Inputs,
        *,
        timeout_s: float | None = None,
        **options: Unpack[EmbedOptions],
    ) -> Embedding:
        """See `Client.embed`."""
        return await self._embed(calls.embed(inputs, options), timeout_s)

    def embed_layers(
        self,
        inputs: Inputs,
        *,
        timeout_s: float | None = None,
        **options: Unpack[LayerOptions],
    ) -> AsyncIterator[LayerRows]:
        """See `Client.embed_layers`."""
        return self._layers(calls.embed_layers(inputs, options), timeout_s)

    def embed_stream(
        self,
        inputs: Items,
        *,
        ordered: bool = True,
        on_error: OnError = "return",
        item_timeout_s: float | None = None,
        reconnect_timeout_s: float | None = None,
        **options: Unpack[EmbedOptions],
    ) -> AsyncIterator[StreamResult]:
        """See `Client.embed_stream`; `inputs` may also be an async iterable."""
        ledger = StreamLedger(calls.embed_stream(options), ordered=ordered)
        if not isinstance(inputs, AsyncIterable):
            check_items(inputs)
        return self._results(ledger, inputs, raises(on_error), item_timeout_s, reconnect_timeout_s)

    @overload
    async def encode(
        self,
        sentences: Sentences,
        prompt_name: str | None = ...,
        prompt: str | None = ...,
        batch_size: int | None = ...,
        show_progress_bar: bool | None = ...,
        output_value: Literal["sentence_embedding"] = ...,
        precision: Precision = ...,
        *,
        timeout_s: float | None = ...,
        **options: Unpack[EncodeOptions],
    ) -> npt.NDArray[Any]: ...
    @overload
    async def encode(
        self,
        sentences: Sentences,
        prompt_name: str | None = ...,
        prompt: str | None = ...,
        batch_size: int | None = ...,
        show_progress_bar: bool | None = ...,
        output_value: OutputValue = ...,
        precision: Precision = ...,
        *,
        timeout_s: float | None = ...,
        **options: Unpack[EncodeOptions],
    ) -> npt.NDArray[Any] | list[npt.NDArray[Any]]: ...
    async def encode(
        self,
        sentences: Sentences = (),
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        output_value: OutputValue = "sentence_embedding",
        precision: Precision = "float32",
        *,
        timeout_s: float | None = None,
        **options: Unpack[EncodeOptions],
    ) -> npt.NDArray[Any] | list[npt.NDArray[Any]]:
        """See `Client.encode`."""
        check_options(options)
        try:
            self._model = self._model or await self.model_info(timeout_s=timeout_s)
            encoding = Encoding(
                sentences,
                self._model,
                prompt_name=prompt_name,
                prompt=prompt,
                batch_size=batch_size,
                output_value=output_value,
                precision=precision,
                **options,
            )
            with progress.bar(total=len(encoding.texts), unit="text", shown=show_progress_bar) as advance:
                if (request := encoding.request()) is not None:
                    advance(encoding.note(0, await self._embed(request, timeout_s)))
                elif encoding.texts:
                    running = self._results(encoding.ledger(), encoding.texts, True, timeout_s, timeout_s)
                    async with contextlib.aclosing(running) as results:
                        async for result in results:
                            advance(encoding.note(result.index, result.embedding))
        except LayertapError:
            self._model = None
            raise
        return await asyncio.to_thread(encoding.answer)

    async def encode_query(
        self,
        sentences: Sentences,
        prompt_name: str | None = None,
        prompt: str | None = None,
        **options: Unpack[TaskOptions],
    ) -> npt.NDArray[Any] | list[npt.NDArray[Any]]:
        """See `Client.encode_query`."""
        options["task"] = "query"
        return await self.encode(sentences, prompt_name, prompt, **options)

    async def encode_document(
        self,
        sentences: Sentences,
        prompt_name: str | None = None,
        prompt: str | None = None,
        **options: Unpack[TaskOptions],
    ) -> npt.NDArray[Any] | list[npt.NDArray[Any]]:
        """See `Client.encode_document`."""
        options["task"] = "document"
        return await self.encode(sentences, prompt_name, prompt, **options)

    async def wait_until_ready(self, *, timeout_s: float | None = None) -> None:
        """See `Client.wait_until_ready`."""
        waiting = calls.Waiting(self._link.timeout_s(timeout_s))
        while True:
            try:
                await self.model_info(timeout_s=waiting.left_s)
                return
            except calls.PASSING as exc:
                await asyncio.sleep(waiting.pause_s(exc))

    async def model_info(self, *, timeout_s: float | None = None) -> ModelInfo:
        """See `Client.model_info`."""
        return calls.read_model_info(await self._link.unary(calls.model_info(), timeout_s))

    async def close(self) -> None:
        """See `Client.close`."""
        await self._link.close()

    async def __aenter__(self) -> Self:
        """Returns itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the connection."""
        await self.close()

    def __repr__(self) -> str:
        """Says where it talks to."""
        return f"AsyncClient({self.target!r})"

    async def _embed(self, call: calls.Embed, timeout_s: float | None) -> Embedding:
        assembler = call.assembler()
        if call.unary is not None:
            return assembler.whole(await self._link.unary(call.unary, timeout_s))
        async with contextlib.aclosing(self._link.layers(call.stream, timeout_s)) as parts:
            async for message in parts:
                assembler.feed(*message)
        return assembler.finish()

    async def _layers(self, call: calls.Embed, timeout_s: float | None) -> AsyncGenerator[LayerRows, None]:
        assembler = LayerAssembler(call.messages, call.options)
        async with contextlib.aclosing(self._link.layers(call.stream, timeout_s)) as parts:
            async for message in parts:
                for rows in assembler.feed(*message):
                    yield rows
        assembler.finish()

    async def _results(
        self,
        ledger: StreamLedger,
        inputs: Items,
        raising: bool,
        item_timeout_s: float | None,
        reconnect_timeout_s: float | None,
    ) -> AsyncGenerator[StreamResult, None]:
        channel, lease = self._link.open()
        item_s, reconnect_s = self._link.timeout_s(item_timeout_s), self._link.timeout_s(reconnect_timeout_s)
        running = run_stream(self._link.connection, channel, lease.begin, ledger, inputs, item_s, reconnect_s)
        async with contextlib.aclosing(running) as groups:
            async for group in groups:
                for result in group:
                    if raising and result.error is not None:
                        raise result.error
                    yield result
