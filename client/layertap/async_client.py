"""`AsyncClient`: the twin of `Client` for asyncio, to be shared by the tasks of one event loop.

Every method has the same name, arguments and errors; it awaits, and every iterator is an `async for`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import grpc
import grpc.aio
import numpy.typing as npt

from layertap import calls, progress, stream, wire
from layertap.assembler import LayerAssembler
from layertap.calls import DEFAULT_TIMEOUT_S, Layers, Poolings, ResponseT
from layertap.channel import CHANNEL_OPTIONS, CLOSED_DURING_CALL, DEFAULT_TARGET, translate
from layertap.embedding import Embedding, LayerRows, StreamResult
from layertap.errors import CancelledError, FailedPreconditionError, LayertapError
from layertap.inputs import Inputs, to_messages
from layertap.lease import AsyncLease
from layertap.ledger import StreamLedger
from layertap.sentences import EncodeOptions, Encoding
from layertap.shm import SharedMemory, take
from layertap.types import LayerMix, ModelInfo, TokenIds, Tokens
from layertap.v1 import embedding_pb2 as pb


class AsyncClient:
    """The same as `Client` for asyncio: every method awaits, every iterator is an `async for`.

    Example:
        >>> async with AsyncClient("127.0.0.1:50051") as client:
        ...     embedding = await client.embed("I love Paris")
    """

    def __init__(self, target: str = DEFAULT_TARGET, *, shared_memory: bool = False) -> None:
        """See `Client`."""
        self.target = target
        self.shared_memory = SharedMemory(wanted=shared_memory)
        self._channel: grpc.aio.Channel | None = None
        self._lease: AsyncLease | None = None
        self._owner: tuple[int, asyncio.AbstractEventLoop] | None = None
        self._closed = False
        self._model: ModelInfo | None = None

    async def tokenize(
        self,
        inputs: Inputs,
        *,
        pad_to: int | None = None,
        add_special_tokens: bool = True,
        truncation: str = "error",
        max_length: int | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Tokens:
        """See `Client.tokenize`."""
        requests = calls.tokenize(
            inputs, pad_to=pad_to, add_special_tokens=add_special_tokens, truncation=truncation, max_length=max_length
        )
        return calls.read_tokens([await self._unary(request, timeout_s) for request in requests])

    async def decode(
        self,
        ids: Tokens | TokenIds | npt.ArrayLike | Iterable[npt.ArrayLike],
        *,
        skip_special_tokens: bool = True,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> list[str]:
        """See `Client.decode`."""
        request = calls.decode(ids, skip_special_tokens=skip_special_tokens)
        return list((await self._unary(request, timeout_s)).texts)

    async def embed(
        self,
        inputs: Inputs,
        *,
        layers: Layers = None,
        pooler_output: bool = False,
        pooling: Poolings = None,
        words: str | None = None,
        mix: LayerMix | None = None,
        dtype: str = "float32",
        truncation: str = "error",
        max_length: int | None = None,
        return_tokens: bool = False,
        prompt: str | None = None,
        prompt_name: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Embedding:
        """See `Client.embed`."""
        options = calls.embed_options(
            layers=layers,
            pooler_output=pooler_output,
            pooling=pooling,
            words=words,
            mix=mix,
            dtype=dtype,
            truncation=truncation,
            max_length=max_length,
            return_tokens=return_tokens,
            prompt=prompt,
            prompt_name=prompt_name,
        )
        return await self._embed(calls.Embed(to_messages(inputs), options), timeout_s)

    async def embed_layers(
        self,
        inputs: Inputs,
        *,
        layers: Layers = "all",
        dtype: str = "float32",
        truncation: str = "error",
        max_length: int | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> AsyncIterator[LayerRows]:
        """See `Client.embed_layers`."""
        options = calls.embed_options(
            layers=layers,
            pooler_output=False,
            pooling=None,
            dtype=dtype,
            truncation=truncation,
            max_length=max_length,
            return_tokens=False,
            prompt=prompt,
            prompt_name=prompt_name,
        )
        call = calls.Embed(to_messages(inputs), options)
        assembler = LayerAssembler(call.messages, call.options)
        async with contextlib.aclosing(self._layers(call.stream, timeout_s)) as parts:
            async for message in parts:
                for rows in assembler.feed(*message):
                    yield rows
        assembler.finish()

    async def embed_stream(
        self,
        inputs: stream.Items,
        *,
        layers: Layers = None,
        pooler_output: bool = False,
        pooling: Poolings = None,
        words: str | None = None,
        mix: LayerMix | None = None,
        dtype: str = "float32",
        truncation: str = "error",
        max_length: int | None = None,
        return_tokens: bool = False,
        prompt: str | None = None,
        prompt_name: str | None = None,
        ordered: bool = True,
        on_error: str = "return",
        item_timeout_s: float = DEFAULT_TIMEOUT_S,
        reconnect_timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> AsyncIterator[StreamResult]:
        """See `Client.embed_stream`; `inputs` may also be an async iterable."""
        options = calls.embed_options(
            layers=layers,
            pooler_output=pooler_output,
            pooling=pooling,
            words=words,
            mix=mix,
            dtype=dtype,
            truncation=truncation,
            max_length=max_length,
            return_tokens=return_tokens,
            prompt=prompt,
            prompt_name=prompt_name,
        )
        ledger = StreamLedger(options, ordered=ordered)
        running = self._results(ledger, inputs, calls.raises(on_error), item_timeout_s, reconnect_timeout_s)
        async with contextlib.aclosing(running) as results:
            async for result in results:
                yield result

    @overload
    async def encode(
        self,
        sentences: str | Iterable[str],
        *,
        output_value: Literal["sentence_embedding"] = ...,
        **options: Unpack[EncodeOptions],
    ) -> npt.NDArray[Any]: ...
    @overload
    async def encode(
        self, sentences: str | Iterable[str], *, output_value: str, **options: Unpack[EncodeOptions]
    ) -> npt.NDArray[Any] | list[npt.NDArray[Any]]: ...
    async def encode(
        self,
        sentences: str | Iterable[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        output_value: str = "sentence_embedding",
        precision: str = "float32",
        normalize_embeddings: bool | None = None,
        truncate_dim: int | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> npt.NDArray[Any] | list[npt.NDArray[Any]]:
        """See `Client.encode`."""
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
                normalize_embeddings=normalize_embeddings,
                truncate_dim=truncate_dim,
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

    async def model_info(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> ModelInfo:
        """See `Client.model_info`."""
        return calls.read_model_info(await self._unary(calls.model_info(), timeout_s))

    async def close(self) -> None:
        """See `Client.close`."""
        self._closed = True
        channel, self._channel = self._channel, None
        self._lease = None
        if channel is not None and self._owner == (os.getpid(), asyncio.get_running_loop()):
            await channel.close(grace=None)

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

    def _connect(self) -> grpc.aio.Channel:
        if self._closed:
            raise FailedPreconditionError("this client is closed; make a new one")
        owner = os.getpid(), asyncio.get_running_loop()
        if self._channel is None or self._owner != owner:
            self._channel = grpc.aio.insecure_channel(self.target, options=CHANNEL_OPTIONS)
            self._lease = AsyncLease(self._channel, self.shared_memory, self.target)
            self._owner = owner
        return self._channel

    async def _embed(self, call: calls.Embed, timeout_s: float) -> Embedding:
        assembler = call.assembler()
        if call.unary is not None:
            return assembler.whole(await self._unary(call.unary, timeout_s))
        async with contextlib.aclosing(self._layers(call.stream, timeout_s)) as parts:
            async for message in parts:
                assembler.feed(*message)
        return assembler.finish()

    async def _results(
        self,
        ledger: StreamLedger,
        inputs: stream.Items,
        raising: bool,
        item_timeout_s: float,
        reconnect_timeout_s: float,
    ) -> AsyncGenerator[StreamResult, None]:
        channel = self._connect()
        assert self._lease is not None
        running = stream.run(
            self.target, channel, self._lease.begin, ledger, inputs, item_timeout_s, reconnect_timeout_s
        )
        async with contextlib.aclosing(running) as groups:
            async for group in groups:
                for result in group:
                    if raising and result.error is not None:
                        raise result.error
                    yield result

    async def _unary(self, call: calls.Unary[ResponseT], timeout_s: float) -> ResponseT:
        method = self._connect().unary_unary(calls.SERVICE + call.rpc, None, None)
        try:
            raw = await method(call.request.SerializeToString(), timeout=timeout_s)
        except (grpc.RpcError, grpc.aio.UsageError) as exc:
            raise translate(exc, self.target, timeout_s) from exc
        except asyncio.CancelledError as exc:
            self._tell_closing(exc)
            raise
        return calls.read_whole(raw, call.response)

    async def _layers(
        self, request: pb.EmbedLayersRequest, timeout_s: float
    ) -> AsyncGenerator[tuple[pb.EmbedLayersResponse, memoryview, wire.View | None], None]:
        method = self._connect().unary_stream(calls.SERVICE + "EmbedLayers", None, None)
        with contextlib.ExitStack() as stack:
            try:
                shared = await self._lease.begin(timeout_s) if self._lease is not None else None
                if shared is not None:
                    stack.callback(shared.end)
                    request.options.shared_memory.CopyFrom(shared.use)
                call = method(request.SerializeToString(), timeout=timeout_s)
                stack.callback(call.cancel)
                async for raw in call:
                    part, data = wire.split(pb.EmbedLayersResponse, raw)
                    yield part, data, take(shared, part)
            except (grpc.RpcError, grpc.aio.UsageError) as exc:
                raise translate(exc, self.target, timeout_s) from exc
            except asyncio.CancelledError as exc:
                self._tell_closing(exc)
                raise

    def _tell_closing(self, exc: asyncio.CancelledError) -> None:
        """Raises layertap's own error if `close` ended the call; a cancelled task stays one."""
        if self._closed:
            raise CancelledError(CLOSED_DURING_CALL) from exc
