"""`Client`: what a program without an event loop talks to a server with.

Only I/O: what is sent and how answers are read is in `requests`, `assembler` and `stream`; `async_client` is its twin.
The connection is made at the first call, not in the constructor, and anew in a forked child. Threads may share a
client.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import grpc
import numpy.typing as npt

from layertap import progress
from layertap._protocol import requests as calls
from layertap._protocol.assembler import LayerAssembler
from layertap._protocol.inputs import InputItem, Inputs, check_items
from layertap._protocol.options import EmbedOptions, LayerOptions, OnError, TokenizeOptions, check_names, raises
from layertap._protocol.stream_state import StreamLedger
from layertap._shared_memory.mapping import SharedMemory
from layertap._transport.embed_stream import Groups, run_stream
from layertap._transport.settings import DEFAULT_RETRIES, DEFAULT_TIMEOUT_S, TLS, Connection, Option, settle
from layertap._transport.sync_bridge import Iteration
from layertap._transport.transport import Link
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


class Client:
    """Talks to a layertap server and returns numpy arrays.

    Example:
        >>> with Client("127.0.0.1:50051") as client:
        ...     embedding = client.embed("I love Paris")
        ...     embedding.last_hidden_state.shape
        (1, 5, 384)
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
        """Connects at the first call, not here. What is not said is taken from LAYERTAP_… variables.

        Args:
            target: The server: `host:port`, `unix:/path`, `dns:///name:port` (all that the name resolves to, in turns),
                or several `ip:port` with commas between them. None: LAYERTAP_TARGET, else 127.0.0.1:50051.
            shared_memory: Whether layers come through memory shared with the server, if it runs on this host as the
                same user and offers that; else they come as ever, and the log says so. Arrays are then views of that
                memory, which goes back to the server when they are collected; a process that forks copies first what
                its children are to read.
            tls: True encrypts and trusts whom this system trusts; a `TLS` says whom, and who the client is. None: as
                LAYERTAP_TLS_CA, _CERT and _KEY say, if one is set. False: plaintext, also for a token.
            token: The bearer token that each call carries. None: LAYERTAP_TOKEN. Never sent unencrypted to another
                host, unless tls is False.
            retries: How often, 0 to 4, a call is repeated that the server could not take: as soon as it wishes, and
                not if it says that this is of no use.
            options: What gRPC is told besides, as (name, value); see its channel arguments.
            timeout_s: The deadline of calls for which none is named, in seconds. None: LAYERTAP_TIMEOUT_S, else 60.

        Raises:
            InvalidArgumentError: An argument or variable cannot be what it is.
        """
        connection = settle(target, tls=tls, token=token, retries=retries, options=options, timeout_s=timeout_s)
        self._set_up(connection, shared_memory, None)

    @classmethod
    def from_channel(cls, channel: grpc.Channel, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Self:
        """Returns a client that uses a channel of the user's, who goes on to own it: `close` leaves it open.

        Neither the environment nor retries, tokens or certificates of layertap's have a part in it. Such a client has
        no `embed_stream`, which needs a connection of its own, and does not survive a fork.
        """
        client = cls.__new__(cls)
        client._set_up(Connection(target="the given channel", timeout_s=timeout_s), False, channel)
        return client

    def _set_up(self, connection: Connection, shared_memory: bool, channel: grpc.Channel | None) -> None:
        self.target = connection.target
        self.shared_memory = SharedMemory(wanted=shared_memory)
        self._link = Link(connection, self.shared_memory, channel)
        self._model: ModelInfo | None = None

    def tokenize(
        self,
        inputs: Inputs,
        *,
        timeout_s: float | None = None,
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

        Raises:
            InvalidArgumentError: An input or option is at fault; the message names it.
        """
        check_names(options, TokenizeOptions)
        requests = calls.tokenize(inputs, **options)
        return calls.read_tokens([self._link.unary(request, timeout_s) for request in requests])

    def decode(
        self,
        ids: calls.TokenRows,
        *,
        skip_special_tokens: bool = True,
        timeout_s: float | None = None,
    ) -> list[str]:
        """Turns token ids back into strings.

        Args:
            ids: The ids of one text, of several, or `Tokens`.
            skip_special_tokens: Leaves [CLS], [SEP], [PAD] and the like out.
            timeout_s: The deadline, in seconds.

        Raises:
            InvalidArgumentError: An id is outside the vocabulary.
        """
        request = calls.decode(ids, skip_special_tokens=skip_special_tokens)
        return list(self._link.unary(request, timeout_s).texts)

    def embed(
        self,
        inputs: Inputs,
        *,
        timeout_s: float | None = None,
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

        Raises:
            InvalidArgumentError: An input or option is at fault; the message names it.
            FailedPreconditionError: The model has no pooler.
            OutOfRangeError: A value does not fit float16.
            ResourceExhaustedError: The server is full; retry after `retry_after_s`.
            DeadlineExceededError: timeout_s has passed.
            UnavailableError: No server answers.
        """
        return self._embed(calls.embed(inputs, options), timeout_s)

    def embed_layers(
        self,
        inputs: Inputs,
        *,
        timeout_s: float | None = None,
        **options: Unpack[LayerOptions],
    ) -> Iterator[LayerRows]:
        """Embeds texts and yields the rows of each layer as they arrive, while later layers still compute.

        Arguments and errors are those of `embed`. Every text comes once in every layer, whole; layers ascend
        for each text, and texts of one request may come in several groups.
        """
        return self._layers(calls.embed_layers(inputs, options), timeout_s)

    def embed_stream(
        self,
        inputs: Iterable[InputItem],
        *,
        ordered: bool = True,
        on_error: OnError = "return",
        item_timeout_s: float | None = None,
        reconnect_timeout_s: float | None = None,
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

        Yields:
            One result for each input, exactly once.

        Raises:
            UnavailableError: No server answered, at first or for reconnect_timeout_s.
            DeadlineExceededError: Nothing moved for item_timeout_s.
            FailedPreconditionError: A restarted server serves another model.
            Exception: Whatever `inputs` raised, after the results of all that came before it.
        """
        ledger = StreamLedger(calls.embed_stream(options), ordered=ordered)
        check_items(inputs)
        return self._results(ledger, inputs, raises(on_error), item_timeout_s, reconnect_timeout_s)

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
        try:
            self._model = self._model or self.model_info(timeout_s=timeout_s)
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
                    advance(encoding.note(0, self._embed(request, timeout_s)))
                elif encoding.texts:
                    for result in self._results(encoding.ledger(), encoding.texts, True, timeout_s, timeout_s):
                        advance(encoding.note(result.index, result.embedding))
        except LayertapError:
            self._model = None
            raise
        return encoding.answer()

    def encode_query(
        self,
        sentences: Sentences,
        prompt_name: str | None = None,
        prompt: str | None = None,
        **options: Unpack[TaskOptions],
    ) -> npt.NDArray[Any] | list[npt.NDArray[Any]]:
        """Makes one vector of each query: `encode` with the prompt that the model's folder has for it."""
        options["task"] = "query"
        return self.encode(sentences, prompt_name, prompt, **options)

    def encode_document(
        self,
        sentences: Sentences,
        prompt_name: str | None = None,
        prompt: str | None = None,
        **options: Unpack[TaskOptions],
    ) -> npt.NDArray[Any] | list[npt.NDArray[Any]]:
        """Makes one vector of each document: `encode` with the prompt that the model's folder has for it."""
        options["task"] = "document"
        return self.encode(sentences, prompt_name, prompt, **options)

    def wait_until_ready(self, *, timeout_s: float | None = None) -> None:
        """Waits until the server answers calls, as after a start of both at once.

        Args:
            timeout_s: How long to wait, in seconds.

        Raises:
            DeadlineExceededError: It did not in that time; the message says what stood in the way last.
            UnauthenticatedError: It wants another token.
        """
        waiting = calls.Waiting(self._link.timeout_s(timeout_s))
        while True:
            try:
                self.model_info(timeout_s=waiting.left_s)
                return
            except calls.PASSING as exc:
                time.sleep(waiting.pause_s(exc))

    def model_info(self, *, timeout_s: float | None = None) -> ModelInfo:
        """Returns which model is served, its shapes, and the limits in force."""
        return calls.read_model_info(self._link.unary(calls.model_info(), timeout_s))

    def close(self) -> None:
        """Closes the connection; calls and streams under way end with `CancelledError`."""
        self._link.close()

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the connection."""
        self.close()

    def __repr__(self) -> str:
        """Says where it talks to."""
        return f"Client({self.target!r})"

    def _embed(self, call: calls.Embed, timeout_s: float | None) -> Embedding:
        assembler = call.assembler()
        if call.unary is not None:
            return assembler.whole(self._link.unary(call.unary, timeout_s))
        for message in self._link.layers(call.stream, timeout_s):
            assembler.feed(*message)
        return assembler.finish()

    def _layers(self, call: calls.Embed, timeout_s: float | None) -> Iterator[LayerRows]:
        assembler = LayerAssembler(call.messages, call.options)
        for message in self._link.layers(call.stream, timeout_s):
            yield from assembler.feed(*message)
        assembler.finish()

    def _results(
        self,
        ledger: StreamLedger,
        inputs: Iterable[InputItem],
        raising: bool,
        item_timeout_s: float | None,
        reconnect_timeout_s: float | None,
    ) -> Iterator[StreamResult]:
        item_s, reconnect_s = self._link.timeout_s(item_timeout_s), self._link.timeout_s(reconnect_timeout_s)

        def start() -> Groups:
            return run_stream(self._link.connection, None, self._link.begin, ledger, inputs, item_s, reconnect_s)

        with self._link.iterating(Iteration(start)) as groups:
            for group in groups:
                for result in group:
                    if raising and result.error is not None:
                        raise result.error
                    yield result
