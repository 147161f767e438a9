"""`AsyncClient`: the twin of `Client` for asyncio, to be shared by the tasks of one event loop.

Every method has the same name, arguments and errors; it awaits, and every iterator is an `async for`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, overload

import numpy.typing as npt

from layertap import progress
from layertap._protocol import requests as calls
from layertap._protocol.assembler import EmbedAssembler, LayerAssembler
from layertap._protocol.collected import CollectedStream
from layertap._protocol.inputs import InputItem, Inputs, check_items
from layertap._protocol.options import EmbedOptions, LayerOptions, OnError, TokenizeOptions, check_names, raises
from layertap._protocol.stream_state import StreamState
from layertap._transport import fork
from layertap._transport.base import BaseClient
from layertap._transport.readiness import PASSING, Readiness
from layertap._transport.settings import DEFAULT_TIMEOUT_S, CallSettings, Metadata
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

if TYPE_CHECKING:
    import grpc
    import grpc.aio

    from layertap._transport.transport import AsyncTransport
    from layertap.v1 import embedding_pb2 as pb

Items = Iterable[InputItem] | AsyncIterable[InputItem]


class AsyncClient(BaseClient):
    """The same as `Client` for asyncio: every method awaits, every iterator is an `async for`.

    Example:
        >>> async with AsyncClient("127.0.0.1:50051") as client:
        ...     embedding = await client.embed("I love Paris")
    """

    @classmethod
    def from_channel(cls, channel: grpc.aio.Channel, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Self:
        """See `Client.from_channel`."""
        return cls._from_channel(channel, timeout_s)

    @property
    def _transport(self) -> AsyncTransport:
        def make() -> AsyncTransport:
            fork.prepare()
            # Not before the first call: importing gRPC reads the environment.
            from layertap._transport.transport import AsyncTransport

            return AsyncTransport(self._connection, self.shared_memory, self._given)

        return self._lazy("_opened", make)  # type: ignore[no-any-return]

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
        requests = calls.tokenize(inputs, **options)
        call, answers, request_id = self._connection.call(timeout_s, metadata), [], None
        for request in requests:
            reply = await self._transport.unary(request, call)
            calls.check_tokens(request, reply.message, self._transport.pin)
            answers.append(reply.message)
            request_id = reply.request_id
        return calls.read_tokens(answers, request_id)

    async def decode(
        self,
        ids: calls.TokenRows,
        *,
        skip_special_tokens: bool = True,
        timeout_s: float | None = None,
        metadata: Metadata = (),
    ) -> list[str]:
        """See `Client.decode`."""
        request = calls.decode(ids, skip_special_tokens=skip_special_tokens)
        call = self._connection.call(timeout_s, metadata)
        reply = await self._transport.unary(request, call)
        return calls.read_texts(request, reply.message, self._transport.pin)

    async def embed(
        self,
        inputs: Inputs,
        *,
        timeout_s: float | None = None,
        metadata: Metadata = (),
        **options: Unpack[EmbedOptions],
    ) -> Embedding:
        """See `Client.embed`."""
        return await self._embed(calls.embed(inputs, options), self._connection.call(timeout_s, metadata))

    def embed_layers(
        self,
        inputs: Inputs,
        *,
        timeout_s: float | None = None,
        metadata: Metadata = (),
        **options: Unpack[LayerOptions],
    ) -> AsyncIterator[LayerRows]:
        """See `Client.embed_layers`."""
        return self._layers(calls.embed_layers(inputs, options), self._connection.call(timeout_s, metadata))

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
    ) -> AsyncIterator[StreamResult]:
        """See `Client.embed_stream`; `inputs` may also be an async iterable."""
        state = StreamState(calls.embed_stream(options), ordered=ordered, pin=self._transport.pin)
        if not isinstance(inputs, AsyncIterable):
            check_items(inputs)
        return self._results(
            state,
            inputs,
            self._connection.call(None, metadata),
            raising=raises(on_error),
            item_timeout_s=item_timeout_s,
            reconnect_timeout_s=reconnect_timeout_s,
        )

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
        metadata: Metadata = ...,
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
        metadata: Metadata = ...,
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
        metadata: Metadata = (),
        **options: Unpack[EncodeOptions],
    ) -> npt.NDArray[Any] | list[npt.NDArray[Any]]:
        """See `Client.encode`."""
        check_options(options)
        call = self._connection.call(timeout_s, metadata)
        encoding = Encoding(
            sentences,
            await self._info(call),
            prompt_name=prompt_name,
            prompt=prompt,
            batch_size=batch_size,
            output_value=output_value,
            precision=precision,
            **options,
        )
        with progress.bar(total=len(encoding.texts), unit="text", shown=show_progress_bar) as advance:
            if (request := encoding.request()) is not None:
                advance(encoding.note(0, await self._embed(request, call)))
            elif encoding.texts:
                running = self._results(
                    encoding.state(self._transport.pin),
                    encoding.texts,
                    call,
                    raising=True,
                    item_timeout_s=call.timeout_s,
                    reconnect_timeout_s=call.timeout_s,
                )
                async with contextlib.aclosing(running) as results:
                    async for result in results:
                        advance(encoding.note(result.index, result.embedding))
        return await asyncio.to_thread(encoding.answer)

    async def encode_query(
        self,
        sentences: Sentences,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *,
        metadata: Metadata = (),
        **options: Unpack[TaskOptions],
    ) -> npt.NDArray[Any] | list[npt.NDArray[Any]]:
        """See `Client.encode_query`."""
        options["task"] = "query"
        return await self.encode(sentences, prompt_name, prompt, metadata=metadata, **options)

    async def encode_document(
        self,
        sentences: Sentences,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *,
        metadata: Metadata = (),
        **options: Unpack[TaskOptions],
    ) -> npt.NDArray[Any] | list[npt.NDArray[Any]]:
        """See `Client.encode_document`."""
        options["task"] = "document"
        return await self.encode(sentences, prompt_name, prompt, metadata=metadata, **options)

    async def wait_until_ready(self, *, timeout_s: float | None = None, metadata: Metadata = ()) -> None:
        """See `Client.wait_until_ready`."""
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
        reply = await self._transport.unary(calls.model_info(), self._connection.call(timeout_s, metadata))
        info = calls.read_model_info(reply.message)
        self._transport.pin.check(info.model_id, info.fingerprint)
        return info

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

    async def _info(self, call: CallSettings) -> ModelInfo:
        """Returns the served model, from the first time that it was asked for."""
        info: ModelInfo | None = self.__dict__.get("_model")
        if info is None:
            info = await self.model_info(timeout_s=call.timeout_s)
            self._model = info
        return info

    async def _embed(self, request: calls.Embed, call: CallSettings) -> Embedding:
        if request.may_exceed_limits and request.exceeds((await self._info(call)).limits, call.named_timeout):
            state = CollectedStream(request.messages, request.options, self._transport.pin)
            running = self._results(
                state, request.messages, call, raising=True, item_timeout_s=None, reconnect_timeout_s=None
            )
            async with contextlib.aclosing(running) as results:
                async for _ in results:
                    pass
            return state.whole()
        assembler = EmbedAssembler(request.messages, request.options, self._transport.pin)
        if request.is_small:
            reply = await self._transport.unary(request.unary(), call)
            assembler.note_request_id(reply.request_id)
            return assembler.whole(reply.message)
        async with contextlib.aclosing(
            self._transport.layers(request.layers(), call, assembler.note_request_id)
        ) as parts:
            async for part in parts:
                assembler.feed(part.message, part.data, part.view)
        return assembler.finish()

    async def _layers(self, request: calls.Embed, call: CallSettings) -> AsyncGenerator[LayerRows, None]:
        assembler = LayerAssembler(request.messages, request.options, self._transport.pin)
        async with contextlib.aclosing(self._transport.layers(request.layers(), call, lambda _: None)) as parts:
            async for part in parts:
                for rows in assembler.feed(part.message, part.data, part.view):
                    yield rows
        assembler.finish()

    def _results(
        self,
        state: StreamState,
        inputs: Items | list[pb.Input],
        call: CallSettings,
        *,
        raising: bool,
        item_timeout_s: float | None,
        reconnect_timeout_s: float | None,
    ) -> AsyncGenerator[StreamResult, None]:
        """Returns the results of a stream; its arguments are checked here, before it is iterated."""
        seconds = self._connection.stream_seconds(item_timeout_s, reconnect_timeout_s)
        groups = self._transport.stream(
            state, inputs, call, item_timeout_s=seconds.item_timeout_s, reconnect_timeout_s=seconds.reconnect_timeout_s
        )
        return self._flat(groups, raising)

    @staticmethod
    async def _flat(
        groups: AsyncGenerator[list[StreamResult], None], raising: bool
    ) -> AsyncGenerator[StreamResult, None]:
        async with contextlib.aclosing(groups):
            async for group in groups:
                for result in group:
                    if raising and result.error is not None:
                        raise result.error
                    yield result
