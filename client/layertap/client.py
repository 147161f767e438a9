"""`Client`: the methods that a program without an event loop calls; `async_client` is its twin.

Checks arguments and documents them: `requests` builds what is sent, `transport` makes the calls. The connection is made
at the first call, not in the constructor, and anew in a forked child. Threads may share a client.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

from layertap._encode import SentenceClient
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


class Client(SentenceClient):
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

        Raises:
            InvalidArgumentError: if it is no such channel, or timeout_s no number of seconds.
        """
        import grpc

        return cls._from_channel(channel, grpc.Channel, timeout_s)

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
            pad_to: Appends padding until each text has this many tokens.
            add_special_tokens: Whether the special tokens of the tokenizer, such as [CLS] and [SEP], are added.
            truncation: What happens above max_length: "error", "right" or "left" (the side that is cut).
            max_length: The most tokens of one text; None: the model's.
            timeout_s: The deadline of each request, in seconds.
            metadata: Metadata to send with each request, as pairs or a mapping.

        Raises:
            InvalidArgumentError: if an input or option is wrong; the message names it.
        """
        check_names(options, TokenizeOptions)
        call, answers, request_id = self._connection.call(timeout_s, metadata), [], None
        for request in requests.tokenize(inputs, **options):
            reply = self._transport.unary(request, call)
            responses.check_tokens(request.request, reply.message, self._transport.pin)
            answers.append(reply.message)
            request_id = reply.request_id
        return responses.read_tokens(answers, request_id)

    def decode(
        self,
        ids: requests.TokenRows,
        *,
        skip_special_tokens: bool = True,
        timeout_s: float | None = None,
        metadata: Metadata = (),
    ) -> list[str]:
        """Turns token ids back into strings.

        Args:
            ids: The ids of one text, of several, or `Tokens`.
            skip_special_tokens: Leaves special tokens out, such as [CLS], [SEP] and [PAD].
            timeout_s: The deadline, in seconds.
            metadata: Metadata to send, as pairs or a mapping; `x-request-id` names the call in the server's log.

        Raises:
            InvalidArgumentError: if an id is outside the vocabulary.
        """
        request = requests.decode(ids, skip_special_tokens=skip_special_tokens)
        reply = self._transport.unary(request, self._connection.call(timeout_s, metadata))
        return responses.read_texts(request.request, reply.message, self._transport.pin)

    def embed(
        self,
        inputs: Inputs,
        *,
        timeout_s: float | None = None,
        metadata: Metadata = (),
        **options: Unpack[SpanOptions],
    ) -> Embedding:
        """Embeds texts and returns all requested outputs, from one forward pass.

        Args:
            inputs: One str, or an iterable of texts: str, (str, str) pairs, lists of words, token ids, `TokenIds`;
                or a batch: `TokenIds`, `Tokens`, or what a transformers tokenizer answers.
            layers: "all", a layer number or several (negative ones count from the last). None: no layer beside a mix,
                or without words beside poolings, spans or pooler_output; the last layer otherwise.
            pooler_output: Whether to return the model's pooler.
            pooling: A strategy ("mean", "cls", "max", "last", "mean_sqrt_len", "mean_max"), a `Pooling`, or several.
            words: "first", "last", "mean" or "first_last" ([first; last], twice as wide): the rows of `layers` and
                `mix` then come one a word, pooled so from the rows of its tokens, instead of one a token.
            mix: Several layers as one; beside `layers`, if both are given.
            attentions: "all", a layer number or several, from 0 to layer_count - 1: the attention probabilities of
                these encoder blocks.
            attention_heads: Which heads of them, in this order; None: all.
            dtype: The number format on the wire: "float32", "float16", or "bfloat16" (returned as float32).
            truncation: What happens above max_length: "error", "right" or "left". Token ids are never cut.
            max_length: The most tokens of one text; None: the model's.
            windows: Lets texts above max_length run as windows that overlap, `Windows(stride=128)`, instead of being
                refused; `window_counts` of the answer says how many. Not for pairs, token ids and attentions.
            spans: Parts of the text that get a vector each: (start, end) pairs, of several texts one list for each.
                Vectors are made of the whole text's rows; see `Spanned`, which carries them with a text.
            span_unit: What spans count: "characters" or "tokens".
            span_pooling: How the rows of a span become its vector, as in `pooling`; None: "mean" if there are spans.
            return_tokens: Whether to return the tokens too.
            prompt: Put before each text as it stands, with its space, of a pair before the first string; words and
                token ids take none. Tokens and their offsets are those of both together; pools leave it out if
                `model_info().sentence_config` says so.
            prompt_name: The same by its name in `model_info().sentence_config.prompts`.
            timeout_s: The deadline, in seconds.
            metadata: Metadata to send, as pairs or a mapping; `x-request-id` names the call in the server's log.

        Raises:
            InvalidArgumentError: if an input or option is wrong; the message names it.
            FailedPreconditionError: if the model has no pooler.
            OutOfRangeError: if a value does not fit float16.
            ResourceExhaustedError: if the server is full; retry after `retry_after_s`.
            DeadlineExceededError: if timeout_s has passed.
            UnavailableError: if no server answers.
        """
        return self._transport.embed(requests.embed(inputs, options), self._connection.call(timeout_s, metadata))

    def embed_layers(
        self,
        inputs: Inputs,
        *,
        timeout_s: float | None = None,
        metadata: Metadata = (),
        **options: Unpack[LayerOptions],
    ) -> Generator[LayerRows, None, None]:
        """Embeds texts and yields the rows of each layer as they arrive, while the server still computes later layers.

        Arguments and errors are those of `embed`. Each text comes once in each layer, whole. The layers of
        one text ascend; the texts of one request may come in several groups.
        """
        request = requests.embed_layers(inputs, options)
        return self._transport.embed_layers(request, self._connection.call(timeout_s, metadata))

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
    ) -> Generator[StreamResult, None, None]:
        """Embeds any number of texts over one call, in bounded memory, and resumes after a lost connection.

        Args:
            inputs: An iterable of texts as in `embed`; it is read while earlier texts are sent, never far ahead.
            options: As in `embed`.
            ordered: Whether results come in the order of the inputs, or as they finish.
            on_error: "return" yields a bad item's error as its result; "raise" raises it.
            item_timeout_s: The longest time without an answer while items wait, in seconds; there is no total deadline.
            reconnect_timeout_s: How long to look for the server after a lost connection, in seconds.
            metadata: As in `embed`.

        Yields:
            One result for each input, exactly once.

        Raises:
            UnavailableError: if no server answered, at first or for reconnect_timeout_s.
            DeadlineExceededError: if no item was answered or read for item_timeout_s.
            FailedPreconditionError: if a restarted server serves another model.
            Exception: if `inputs` raises it; it comes after the results of all texts before it.
        """
        state = StreamState(requests.embed_stream(options), ordered=ordered, pin=self._transport.pin)
        check_items(inputs)
        settings = self._connection.stream(item_timeout_s, reconnect_timeout_s, metadata, raising=raises(on_error))
        return self._transport.stream(state, inputs, settings)

    def wait_until_ready(self, *, timeout_s: float | None = None, metadata: Metadata = ()) -> None:
        """Waits until the server answers calls, as after a start of both at once.

        Args:
            timeout_s: How long to wait, in seconds.
            metadata: Metadata to send with each call, as pairs or a mapping.

        Raises:
            DeadlineExceededError: if it did not in that time; the message gives the last reason.
            UnauthenticatedError: if the server requires another token.
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
        return self._transport.model_info(self._connection.call(timeout_s, metadata))

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
