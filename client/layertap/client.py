"""`Client`: what a program without an event loop talks to a server with.

Only I/O: what is sent and how answers are read is in `requests`, `assembler` and `stream`; `async_client` is its twin.
The connection is made at the first call, not in the constructor, and anew in a forked child. Threads may share a
client.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterable, Iterator
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
from layertap._transport.threads import check_threads
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

    from layertap._transport.transport import Transport
    from layertap.v1 import embedding_pb2 as pb


class Client(BaseClient):
    """Talks to a layertap server and returns numpy arrays.

    Example:
        >>> with Client("127.0.0.1:50051") as client:
        ...     embedding = client.embed("I love Paris")
        ...     embedding.last_hidden_state.shape
        (1, 5, 384)
    """

    @classmethod
    def from_channel(cls, channel: grpc.Channel, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Self:
        """Returns a client over a channel of the caller, who goes on to own it: `close` leaves it open.

        The environment, retries, tokens and certificates of layertap have no part in it. Such a client cannot be
        pickled or copied, and does not survive a fork.
        """
        return cls._from_channel(channel, timeout_s)

    @property
    def _transport(self) -> Transport:
        def make() -> Transport:
            fork.prepare()
            # Not before the first call: importing gRPC reads the environment.
            from layertap._transport.transport import Transport

            return Transport(self._connection, self.shared_memory, self._given)

        return self._lazy("_opened", make)  # type: ignore[no-any-return]

    def tokenize(
        self,
        inputs: Inputs,
        *,
        timeout_s: float | None = None,
        metadata: Metadata = (),
        **options: Unpack[TokenizeOptions],
    ) -> Tokens:
        """Turns texts into tokens, exactly as the model's transformers tokenizer does.

        Args:
            inputs: One str, or an iterable of texts: str, (str, str) pairs, or lists of words.
            pad_to: Appends [PAD] until each text has this many tokens.
            add_special_tokens: Whether [CLS] and [SEP] are added.
            truncation: What happens above max_length: "error", "right" or "left" (the side that is cut).
            max_length: The most tokens of one text; None: the model's.
            timeout_s: The deadline of each request, in seconds.
            metadata: What each request carries besides, as pairs or a mapping.

        Raises:
            InvalidArgumentError: An input or option is at fault; the message names it.
        """
        check_names(options, TokenizeOptions)
        requests = calls.tokenize(inputs, **options)
        call, answers, request_id = self._connection.call(timeout_s, metadata), [], None
        for request in requests:
            reply = self._transport.unary(request, call)
            calls.check_tokens(request, reply.message, self._transport.pin)
            answers.append(reply.message)
            request_id = reply.request_id
        return calls.read_tokens(answers, request_id)

    def decode(
        self,
        ids: calls.TokenRows,
        *,
        skip_special_tokens: bool = True,
        timeout_s: float | None = None,
        metadata: Metadata = (),
    ) -> list[str]:
        """Turns token ids back into strings.

        Args:
            ids: The ids of one text, of several, or `Tokens`.
            skip_special_tokens: Leaves [CLS], [SEP], [PAD] and the like out.
            timeout_s: The deadline, in seconds.
            metadata: What the call carries besides, as pairs or a mapping; `x-request-id` names it in the server's log.

        Raises:
            InvalidArgumentError: An id is outside the vocabulary.
        """
        request = calls.decode(ids, skip_special_tokens=skip_special_tokens)
        call = self._connection.call(timeout_s, metadata)
        return calls.read_texts(request, self._transport.unary(request, call).message, self._transport.pin)

    def embed(
        self,
        inputs: Inputs,
        *,
        timeout_s: float | None = None,
        metadata: Metadata = (),
        **options: Unpack[EmbedOptions],
    ) -> Embedding:
        """Embeds texts and returns everything that was asked for, from one forward pass.

        Args:
            inputs: One str, or an iterable of texts: str, (str, str) pairs, lists of words, token ids, `TokenIds`;
                or a batch: `TokenIds`, `Tokens`, or what a transformers tokenizer answers.
            layers: "all", a layer number or several (negative ones count from the last). None: the last layer if
                nothing else is asked, or words without a mix; no layer otherwise.
            pooler_output: Whether to return the model's pooler.
            pooling: A strategy ("mean", "cls", "max", "last", "mean_sqrt_len", "mean_max"), a `Pooling`, or several.
            words: "first", "last", "mean" or "first_last" ([first; last], twice as wide): the rows of `layers` and
                `mix` then come one a word, pooled so from the rows of its tokens, instead of one a token.
            mix: Several layers as one; beside `layers`, if both are given.
            dtype: The number format on the wire: "float32", "float16", or "bfloat16" (returned as float32).
            truncation: What happens above max_length: "error", "right" or "left". Token ids are never cut.
            max_length: The most tokens of one text; None: the model's.
            return_tokens: Whether to return the tokens too.
            prompt: Put before each text as it stands, with its space; only plain strings take one. Tokens and their
                offsets are those of both together; pools leave it out if `model_info().sentence_config` says so.
            prompt_name: The same by its name in `model_info().sentence_config.prompts`.
            timeout_s: The deadline, in seconds.
            metadata: What the call carries besides, as pairs or a mapping; `x-request-id` names it in the server's log.

        Raises:
            InvalidArgumentError: An input or option is at fault; the message names it.
            FailedPreconditionError: The model has no pooler.
            OutOfRangeError: A value does not fit float16.
            ResourceExhaustedError: The server is full; retry after `retry_after_s`.
            DeadlineExceededError: timeout_s has passed.
            UnavailableError: No server answers.
        """
        return self._embed(calls.embed(inputs, options), self._connection.call(timeout_s, metadata))

    def embed_layers(
        self,
        inputs: Inputs,
        *,
        timeout_s: float | None = None,
        metadata: Metadata = (),
        **options: Unpack[LayerOptions],
    ) -> Iterator[LayerRows]:
        """Embeds texts and yields the rows of each layer as they arrive, while later layers still compute.

        Arguments and errors are those of `embed`. Every text comes once in every layer, whole; layers ascend
        for each text, and texts of one request may come in several groups.
        """
        return self._layers(calls.embed_layers(inputs, options), self._connection.call(timeout_s, metadata))

    def embed_stream(
        self,
        inputs: Iterable[InputItem],
        *,
        ordered: bool = True,
        on_error: OnError = "return",
        item_timeout_s: float | None = None,
        reconnect_timeout_s: float | None = None,
        metadata: Metadata = (),
        **options: Unpack[EmbedOptions],
    ) -> Iterator[StreamResult]:
        """Embeds any number of texts over one call, without holding them all, and survives lost connections.

        Args:
            inputs: An iterable of texts as in `embed`; read beside the sending, never far ahead.
            layers: As in `embed`.
            pooler_output: As in `embed`.
            pooling: As in `embed`.
            words: As in `embed`.
            mix: As in `embed`.
            dtype: As in `embed`.
            truncation: As in `embed`.
            max_length: As in `embed`.
            return_tokens: As in `embed`.
            prompt: As in `embed`.
            prompt_name: As in `embed`.
            ordered: Whether results come in the order of the inputs, or as they finish.
            on_error: "return" yields a bad item's error as its result; "raise" raises it.
            item_timeout_s: How long nothing may move while items wait, in seconds. There is no total deadline.
            reconnect_timeout_s: How long to look for the server after a lost connection, in seconds.
            metadata: As in `embed`.

        Yields:
            One result for each input, exactly once.

        Raises:
            UnavailableError: No server answered, at first or for reconnect_timeout_s.
            DeadlineExceededError: Nothing moved for item_timeout_s.
            FailedPreconditionError: A restarted server serves another model.
            Exception: Whatever `inputs` raised, after the results of all that came before it.
        """
        state = StreamState(calls.embed_stream(options), ordered=ordered, pin=self._transport.pin)
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
        batch_size: int | None = ...,
        show_progress_bar: bool | None = ...,
        output_value: OutputValue = ...,
        precision: Precision = ...,
        *,
        timeout_s: float | None = ...,
        metadata: Metadata = ...,
        **options: Unpack[EncodeOptions],
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
        """Makes one vector of each text, as `SentenceTransformer.encode` does with the same model.

        What the model's folder says is done: its poolings, Normalize, max_seq_length (longer texts are cut), lower
        case, prompts. Many texts go over one stream, so that neither side holds more of them than it works on.

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
            timeout_s: How long an answer may take in seconds; of many texts, how long nothing may come.
            metadata: What each call carries besides, as pairs or a mapping.

        Returns:
            Vectors. Shape: [text_count, dim], or [dim] for one str. With "token_embeddings" a list with one array for
            each text, or one for one str. Shape: [token_count, hidden_size].

        Raises:
            TypeError: if an option asks for what layertap cannot do, such as tensors (convert_to_tensor) or a device.
            InvalidArgumentError: An argument or a text is at fault; the message names it.
            FailedPreconditionError: The model's folder asks for something that layertap cannot do, or the server now
                serves another model than at the last call.
            ModuleNotFoundError: A progress bar is wanted and tqdm is not installed.
        """
        check_options(options)
        call = self._connection.call(timeout_s, metadata)
        encoding = Encoding(
            sentences,
            self._info(call),
            prompt_name=prompt_name,
            prompt=prompt,
            batch_size=batch_size,
            output_value=output_value,
            precision=precision,
            **options,
        )
        with progress.bar(total=len(encoding.texts), unit="text", shown=show_progress_bar) as advance:
            if (request := encoding.request()) is not None:
                advance(encoding.note(0, self._embed(request, call)))
            elif encoding.texts:
                running = self._results(
                    encoding.state(self._transport.pin),
                    encoding.texts,
                    call,
                    raising=True,
                    item_timeout_s=call.timeout_s,
                    reconnect_timeout_s=call.timeout_s,
                )
                for result in running:
                    advance(encoding.note(result.index, result.embedding))
        return encoding.answer()

    def encode_query(
        self,
        sentences: Sentences,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *,
        metadata: Metadata = (),
        **options: Unpack[TaskOptions],
    ) -> npt.NDArray[Any] | list[npt.NDArray[Any]]:
        """Makes one vector of each query: `encode` with the prompt that the model's folder has for it."""
        options["task"] = "query"
        return self.encode(sentences, prompt_name, prompt, metadata=metadata, **options)

    def encode_document(
        self,
        sentences: Sentences,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *,
        metadata: Metadata = (),
        **options: Unpack[TaskOptions],
    ) -> npt.NDArray[Any] | list[npt.NDArray[Any]]:
        """Makes one vector of each document: `encode` with the prompt that the model's folder has for it."""
        options["task"] = "document"
        return self.encode(sentences, prompt_name, prompt, metadata=metadata, **options)

    def wait_until_ready(self, *, timeout_s: float | None = None, metadata: Metadata = ()) -> None:
        """Waits until the server answers calls, as after a start of both at once.

        Args:
            timeout_s: How long to wait, in seconds.
            metadata: What each call carries besides, as pairs or a mapping.

        Raises:
            DeadlineExceededError: It did not in that time; the message says what stood in the way last.
            UnauthenticatedError: It wants another token.
        """
        call = self._connection.call(timeout_s, metadata)
        readiness = Readiness(call.timeout_s)
        while True:
            try:
                self.model_info(timeout_s=readiness.left_s, metadata=metadata)
                return
            except PASSING as exc:
                time.sleep(readiness.pause_s(exc))

    def model_info(self, *, timeout_s: float | None = None, metadata: Metadata = ()) -> ModelInfo:
        """Returns which model is served, its shapes, and the limits in force."""
        reply = self._transport.unary(calls.model_info(), self._connection.call(timeout_s, metadata))
        info = calls.read_model_info(reply.message)
        self._transport.pin.check(info.model_id, info.fingerprint)
        return info

    def close(self) -> None:
        """Closes the connection; calls and streams under way end with `CancelledError`."""
        self._transport.close()

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the connection."""
        self.close()

    def _info(self, call: CallSettings) -> ModelInfo:
        """Returns the served model, from the first time that it was asked for."""
        info: ModelInfo | None = self.__dict__.get("_model")
        if info is None:
            info = self.model_info(timeout_s=call.timeout_s)
            self._model = info
        return info

    def _embed(self, request: calls.Embed, call: CallSettings) -> Embedding:
        if request.may_exceed_limits and request.exceeds((self._info(call)).limits, call.named_timeout):
            state = CollectedStream(request.messages, request.options, self._transport.pin)
            running = self._results(
                state, request.messages, call, raising=True, item_timeout_s=None, reconnect_timeout_s=None
            )
            for _ in running:
                pass
            return state.whole()
        assembler = EmbedAssembler(request.messages, request.options, self._transport.pin)
        if request.is_small:
            reply = self._transport.unary(request.unary(), call)
            assembler.note_request_id(reply.request_id)
            return assembler.whole(reply.message)
        for part in self._transport.layers(request.layers(), call, assembler.note_request_id):
            assembler.feed(part.message, part.data, part.view)
        return assembler.finish()

    def _layers(self, request: calls.Embed, call: CallSettings) -> Iterator[LayerRows]:
        assembler = LayerAssembler(request.messages, request.options, self._transport.pin)
        for part in self._transport.layers(request.layers(), call, lambda _: None):
            yield from assembler.feed(part.message, part.data, part.view)
        assembler.finish()

    def _stream(self, state: StreamState, inputs: Iterable[InputItem], timeout_s: float) -> Iterator[StreamResult]:
        """Returns the results of a stream, errors included, for the jobs of the command line."""
        return self._results(
            state,
            inputs,
            self._connection.call(),
            raising=False,
            item_timeout_s=timeout_s,
            reconnect_timeout_s=timeout_s,
        )

    def _results(
        self,
        state: StreamState,
        inputs: Iterable[InputItem] | list[pb.Input],
        call: CallSettings,
        *,
        raising: bool,
        item_timeout_s: float | None,
        reconnect_timeout_s: float | None,
    ) -> Generator[StreamResult, None, None]:
        """Returns the results of a stream; its arguments are checked here, before it is iterated."""
        check_threads()
        seconds = self._connection.stream_seconds(item_timeout_s, reconnect_timeout_s)
        groups = self._transport.stream(
            state, inputs, call, item_timeout_s=seconds.item_timeout_s, reconnect_timeout_s=seconds.reconnect_timeout_s
        )
        return self._flat(groups, raising)

    @staticmethod
    def _flat(groups: Generator[list[StreamResult], None, None], raising: bool) -> Generator[StreamResult, None, None]:
        with contextlib.closing(groups):
            for group in groups:
                for result in group:
                    if raising and result.error is not None:
                        raise result.error
                    yield result
