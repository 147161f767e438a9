"""The requests of all methods of the clients.

Pure: arguments in, requests out. `responses` reads the answers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Generic, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.message import Message

from layertap import wire
from layertap._protocol.inputs import Inputs, spanned, to_messages
from layertap._protocol.option_names import check_names
from layertap._protocol.options import (
    EmbedOptions,
    LayerOptions,
    SpanOptions,
    count,
    embed_options,
    named,
)
from layertap.errors import InvalidArgumentError
from layertap.results.tokens import Tokens
from layertap.types import Limits, TokenIds, TruncationName
from layertap.v1 import embedding_pb2 as pb

SERVICE: Final = f"/{wire.SERVICE_NAME}/"

TokenRows: TypeAlias = Tokens | TokenIds | npt.ArrayLike | Iterable[npt.ArrayLike]
"""The token ids of one text, or of several."""

ResponseT = TypeVar("ResponseT", bound=Message)

_ONE_A_TEXT: Final = frozenset({"pooler_output", "pooled_vectors"})
"""The kinds of outputs that have one row for each text."""

_SURELY_TAKEN: Final = 32
"""No more texts than this go in one request without asking the server for its limit."""

_MOST_OPTIONS: Final = 32
"""How many messages of options are remembered."""
_PLAIN: Final = frozenset({str, int, bool, type(None)})
"""Values of these types are the same if they are equal; those of others may change, or equal what is refused."""

_ENVELOPE_BYTES: Final = 16
"""The most that a message takes in another, beside its own bytes."""

_TOKENIZE_CHARACTERS: Final = 100_000
_TOKENIZE_TEXTS: Final = 256
"""What one Tokenize call holds at most, so that its answer stays a small message."""


@dataclasses.dataclass(frozen=True, slots=True)
class Unary(Generic[ResponseT]):
    """One request and the type of its only response."""

    rpc: str
    request: Message
    response: type[ResponseT]


def model_info() -> Unary[pb.GetModelInfoResponse]:
    """Asks for the served model."""
    return Unary("GetModelInfo", pb.GetModelInfoRequest(), pb.GetModelInfoResponse)


def tokenize(
    inputs: Inputs,
    *,
    pad_to: int | None = None,
    add_special_tokens: bool = True,
    truncation: TruncationName = "error",
    max_length: int | None = None,
) -> Iterator[Unary[pb.TokenizeResponse]]:
    """Asks for tokens, in as many requests as keep each answer small."""
    messages = to_messages(inputs)
    request = functools.partial(
        pb.TokenizeRequest,
        omit_special_tokens=not add_special_tokens,
        truncation=named("truncation", truncation, wire.TRUNCATIONS),
        max_length=count("max_length", max_length),
        pad_to=count("pad_to", pad_to),
    )
    first = characters = 0
    for end, message in enumerate(messages):
        size = message.ByteSize() + 64
        if end > first and (characters + size > _TOKENIZE_CHARACTERS or end - first == _TOKENIZE_TEXTS):
            yield Unary("Tokenize", request(inputs=messages[first:end], first_text=first), pb.TokenizeResponse)
            first, characters = end, 0
        characters += size
    yield Unary("Tokenize", request(inputs=messages[first:], first_text=first), pb.TokenizeResponse)


def decode(ids: TokenRows, *, skip_special_tokens: bool) -> Unary[pb.DecodeResponse]:
    """Asks for strings; `ids` is one text (1-D) or several."""
    if isinstance(ids, Tokens):
        rows = [row[:count].tolist() for row, count in zip(ids.input_ids, ids.token_counts, strict=True)]
    else:
        values = ids.input_ids if isinstance(ids, TokenIds) else ids
        items = list(values) if isinstance(values, Iterable) else [values]
        rows = [items] if items and np.ndim(items[0]) == 0 else [np.asarray(item).tolist() for item in items]
    if not rows:
        raise InvalidArgumentError("ids is empty; pass at least one text")
    try:
        texts = [pb.TokenIds(input_ids=row) for row in rows]
    except (TypeError, ValueError) as exc:
        raise InvalidArgumentError("ids has something that is no 32-bit int; pass ids below vocab_size") from exc
    return Unary("Decode", pb.DecodeRequest(texts=texts, skip_special_tokens=skip_special_tokens), pb.DecodeResponse)


@dataclasses.dataclass(frozen=True, slots=True)
class Embed:
    """One embed request: what is sent, by which RPC, and what must come back."""

    messages: list[pb.Input]
    options: pb.EmbedOptions

    @property
    def may_exceed_limits(self) -> bool:
        """Whether there are so many texts that the server's limits must be known."""
        return len(self.messages) > _SURELY_TAKEN

    def exceeds(self, limits: Limits, named_timeout: bool) -> bool:
        """Returns whether it must go over a stream, because one request may not hold so many texts, or such long ones.

        Raises:
            InvalidArgumentError: if it must, and a deadline was given, which a stream has not.
        """
        size = sum(message.ByteSize() + _ENVELOPE_BYTES for message in self.messages) + self.options.ByteSize()
        bounds = ((len(self.messages), limits.max_text_count), (size + _ENVELOPE_BYTES, limits.max_request_bytes))
        if not any(0 < most < found for found, most in bounds):
            return False
        if named_timeout:
            raise InvalidArgumentError(
                f"inputs has {len(self.messages)} texts of {size} bytes, one request holds {limits.max_text_count} of "
                f"{limits.max_request_bytes}, and more go over a stream, which has no deadline; leave timeout_s out, "
                "or use embed_stream with item_timeout_s"
            )
        return True

    @property
    def is_small(self) -> bool:
        """Whether it asks only for one row a text, so that unary Embed answers it."""
        kinds = [output.WhichOneof("kind") for output in self.options.outputs]
        return not self.options.return_tokens and _ONE_A_TEXT.issuperset(kinds)

    def unary(self) -> Unary[pb.EmbedResponse]:
        """Returns the request as Embed."""
        return Unary("Embed", pb.EmbedRequest(inputs=self.messages, options=self.options), pb.EmbedResponse)

    def layers(self) -> pb.EmbedLayersRequest:
        """Returns the request as EmbedLayers."""
        return pb.EmbedLayersRequest(inputs=self.messages, options=self.options)


def embed(inputs: Inputs, options: SpanOptions) -> Embed:
    """Returns the request that `Client.embed` makes."""
    spans, unit = options.pop("spans", None), options.pop("span_unit", "characters")
    if spans is not None:
        options.setdefault("span_pooling", "mean")
    asked = _options(options, SpanOptions)
    return Embed(to_messages(inputs if spans is None else spanned(inputs, spans, unit)), asked)


def embed_layers(inputs: Inputs, options: LayerOptions) -> Embed:
    """Returns the request that `Client.embed_layers` makes."""
    options.setdefault("layers", "all")
    asked = _options(options, LayerOptions)
    return Embed(to_messages(inputs), asked)


def embed_stream(options: EmbedOptions) -> pb.EmbedOptions:
    """Returns what `Client.embed_stream` asks of each item."""
    return _options(options, EmbedOptions)


def _options(options: Mapping[str, Any], kind: type) -> pb.EmbedOptions:
    """Returns options as a message, if they are among the keys of a `TypedDict`; plain values always as the same one.

    Raises:
        InvalidArgumentError: if a value is wrong.
        TypeError: if a name is.
    """
    read = _plain_options if _PLAIN.issuperset(map(type, options.values())) else _plain_options.__wrapped__
    return read(kind, **options)


@functools.lru_cache(_MOST_OPTIONS, typed=True)
def _plain_options(kind: type, /, **options: Any) -> pb.EmbedOptions:
    check_names(options, kind)
    return embed_options(**options)
