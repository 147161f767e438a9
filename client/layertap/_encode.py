"""`encode` and its two forms, for both clients: what users of sentence-transformers call.

Only I/O: `sentence_transformers` says what to ask of the model and makes the vectors of the answers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import numpy.typing as npt

from layertap import progress
from layertap._protocol.inputs import InputItem
from layertap._protocol.stream_state import StreamState
from layertap._transport import fork
from layertap._transport.base import BaseClient
from layertap._transport.settings import Metadata
from layertap.quantization import Precision
from layertap.results.streamed import StreamResult
from layertap.sentence_transformers import (
    EncodeOptions,
    Encoding,
    OutputValue,
    Sentences,
    check_options,
)

if TYPE_CHECKING:
    from layertap._transport.async_transport import AsyncTransport
    from layertap._transport.transport import Transport


class TaskOptions(EncodeOptions, total=False):
    """The options of `Client.encode_query` and `Client.encode_document`; `Client.encode` documents them."""

    batch_size: int | None
    show_progress_bar: bool | None
    output_value: OutputValue
    precision: Precision
    timeout_s: float | None
    metadata: Metadata


class SentenceClient(BaseClient):
    """The methods of `Client` that return sentence vectors."""

    @functools.cached_property
    def _transport(self) -> Transport:
        fork.prepare()
        # Not before the first call: importing gRPC reads the environment.
        from layertap._transport.transport import Transport

        return self._made(Transport)

    @overload
    def encode(
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
    def encode(
        self,
        sentences: Sentences,
        prompt_name: str | None = ...,
        prompt: str | None = ...,
        **options: Unpack[TaskOptions],
    ) -> npt.NDArray[Any] | list[npt.NDArray[Any]]: ...
    def encode(
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
        """Returns one vector for each text, as `SentenceTransformer.encode` does with the same model.

        The settings of the model's folder apply: its poolings, Normalize, max_seq_length (longer texts are cut),
        lower case, prompts. Many texts go over one stream, in bounded memory on both sides.

        Args:
            sentences: One str, or an iterable of str and pairs, which are tuples of two str.
            prompt_name: The prompt to put before each text, by its name in the model's folder. None: the folder's
                default, if it has one.
            prompt: The prompt itself, which wins over prompt_name; "" for none in spite of a default.
            batch_size: How many texts are sent at once at most. It bounds messages, not memory or speed: the server
                makes batches of its own, by tokens. None: as many as suit the connection.
            show_progress_bar: Whether to show one, with tqdm (the extra `progress`). None: on a terminal, for what
                takes longer than a moment.
            output_value: "sentence_embedding", or "token_embeddings": the last layer's rows of each text.
            precision: "float32", or fewer bits: "int8", "uint8", "binary", "ubinary"; see `quantize_embeddings`.
            normalize_embeddings: Divides each vector by its length. Off, what the model's own Normalize does remains.
            truncate_dim: Keeps the first values of each vector. None: what the folder says, or all.
            windows: Lets texts above max_seq_length run as windows of so many tokens instead of being cut; see `embed`.
            timeout_s: How long an answer may take in seconds; of many texts, how long nothing may come.
            metadata: Metadata to send with each call, as pairs or a mapping.

        Returns:
            Vectors. Shape: [text_count, dim], or [dim] for one str. With "token_embeddings" a list with one array for
            each text, or one for one str. Shape: [token_count, hidden_size].

        Raises:
            TypeError: if an option asks for what layertap cannot do, such as tensors (convert_to_tensor) or a device.
            InvalidArgumentError: if an argument or a text is wrong; the message names it.
            FailedPreconditionError: if the model's folder asks for something that layertap cannot do, or the server now
                serves another model than at the last call.
            ModuleNotFoundError: if a progress bar is requested and tqdm is not installed.
        """
        check_options(options)
        call = self._connection.call(timeout_s, metadata)
        encoding = Encoding(
            sentences,
            self._transport.known_model(call),
            prompt_name=prompt_name,
            prompt=prompt,
            batch_size=batch_size,
            output_value=output_value,
            precision=precision,
            **options,
        )
        with progress.bar(total=len(encoding.texts), shown=show_progress_bar) as advance:
            if (request := encoding.request()) is not None:
                advance(encoding.note(0, self._transport.embed(request, call)))
            elif encoding.texts:
                state = encoding.state(self._transport.pin)
                for result in self._transport.stream(state, encoding.texts, call.for_stream()):
                    advance(encoding.note(result.index, result.embedding))
        return encoding.answer()

    def encode_query(
        self,
        sentences: Sentences,
        prompt_name: str | None = None,
        prompt: str | None = None,
        **options: Unpack[TaskOptions],
    ) -> npt.NDArray[Any] | list[npt.NDArray[Any]]:
        """Returns one vector for each query: `encode` with the prompt that the model's folder has for it."""
        options["task"] = "query"
        return self.encode(sentences, prompt_name, prompt, **options)

    def encode_document(
        self,
        sentences: Sentences,
        prompt_name: str | None = None,
        prompt: str | None = None,
        **options: Unpack[TaskOptions],
    ) -> npt.NDArray[Any] | list[npt.NDArray[Any]]:
        """Returns one vector for each document: `encode` with the prompt that the model's folder has for it."""
        options["task"] = "document"
        return self.encode(sentences, prompt_name, prompt, **options)


class AsyncSentenceClient(BaseClient):
    """The methods of `AsyncClient` that return sentence vectors."""

    @functools.cached_property
    def _transport(self) -> AsyncTransport:
        fork.prepare()
        # Not before the first call: importing gRPC reads the environment.
        from layertap._transport.async_transport import AsyncTransport

        return self._made(AsyncTransport)

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
        **options: Unpack[TaskOptions],
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
            await self._transport.known_model(call),
            prompt_name=prompt_name,
            prompt=prompt,
            batch_size=batch_size,
            output_value=output_value,
            precision=precision,
            **options,
        )
        with progress.bar(total=len(encoding.texts), shown=show_progress_bar) as advance:
            if (request := encoding.request()) is not None:
                advance(encoding.note(0, await self._transport.embed(request, call)))
            elif encoding.texts:
                state = encoding.state(self._transport.pin)
                running = self._transport.stream(state, encoding.texts, call.for_stream())
                async with contextlib.aclosing(running) as results:
                    async for result in results:
                        advance(encoding.note(result.index, result.embedding))
        import asyncio  # Here, for it takes a fifth of the import of the package.

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


def stream_sentences(
    client: SentenceClient, encoding: Encoding, sentences: Iterable[InputItem], timeout_s: float
) -> Generator[StreamResult, None, None]:
    """Returns what `encoding` is to note of any number of sentences, in their order; the error of one is its result.

    `timeout_s` is how long to wait for an answer, or for a lost server, in seconds.
    """
    state = StreamState(encoding.options, ordered=True, pin=client._transport.pin)
    return client._transport.stream(state, sentences, client._connection.stream(timeout_s, timeout_s))
