"""What each method of the clients sends and how it reads the answer: everything but the sending.

Pure: arguments in, requests out; responses in, `types` out. `Client` and `AsyncClient` differ only in how they wait.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Generic, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt
from google.protobuf.message import Message

from layertap import wire
from layertap._protocol import assembler, responses
from layertap._protocol.inputs import Inputs, to_messages
from layertap._protocol.options import EmbedOptions, LayerOptions, check_names, count, embed_options, named
from layertap.errors import (
    DataLossError,
    DeadlineExceededError,
    InvalidArgumentError,
    LayertapError,
    ResourceExhaustedError,
    UnavailableError,
)
from layertap.results.tokens import Tokens
from layertap.types import Limits, ModelInfo, PoolingName, SentenceConfig, TokenIds, TruncationName
from layertap.v1 import embedding_pb2 as pb

SERVICE: Final = f"/{wire.SERVICE_NAME}/"

_STRATEGY_NAMES: Final[dict[int, PoolingName]] = {
    number: cast("PoolingName", name) for name, number in wire.POOLING_STRATEGIES.items()
}

TokenRows: TypeAlias = Tokens | TokenIds | npt.ArrayLike | Iterable[npt.ArrayLike]
"""The token ids of one text, or of several."""

ResponseT = TypeVar("ResponseT", bound=Message)

_WAITING_PAUSE_S: Final = 0.2
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


def read_model_info(message: pb.GetModelInfoResponse) -> ModelInfo:
    """Reads what `model_info` asked for."""
    limits = {field.name: getattr(message.limits, field.name) for field in dataclasses.fields(Limits)}
    special = ("limits", "devices", "special_token_ids", "compute_dtype", "sentence_config")
    same = {f.name: getattr(message, f.name) for f in dataclasses.fields(ModelInfo) if f.name not in special}
    return ModelInfo(
        **same,
        limits=Limits(**limits),
        devices=tuple(message.devices),
        special_token_ids=tuple(message.special_token_ids),
        compute_dtype=wire.DTYPE_NAMES.get(message.compute_dtype, "unknown"),
        sentence_config=_sentence_config(message),
    )


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


def read_tokens(answers: Sequence[pb.TokenizeResponse]) -> Tokens:
    """Reads what `tokenize` asked for."""
    return responses.build_tokens([text for one in answers for text in one.texts], answers[0].pad_token_id)


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
    def unary(self) -> Unary[pb.EmbedResponse] | None:
        """The request as unary Embed if it asks only for one row a text, else None."""
        one_a_text = ("pooler_output", "pooled_vectors")
        if self.options.return_tokens or any(one.WhichOneof("kind") not in one_a_text for one in self.options.outputs):
            return None
        return Unary("Embed", pb.EmbedRequest(inputs=self.messages, options=self.options), pb.EmbedResponse)

    @property
    def stream(self) -> pb.EmbedLayersRequest:
        """The request as EmbedLayers."""
        return pb.EmbedLayersRequest(inputs=self.messages, options=self.options)

    def assembler(self) -> assembler.EmbedAssembler:
        """Returns what puts the answer together."""
        return assembler.EmbedAssembler(self.messages, self.options)


def embed(inputs: Inputs, options: EmbedOptions) -> Embed:
    """Returns the request that `Client.embed` makes."""
    check_names(options, EmbedOptions)
    return Embed(to_messages(inputs), embed_options(**options))


def embed_layers(inputs: Inputs, options: LayerOptions) -> Embed:
    """Returns the request that `Client.embed_layers` makes."""
    check_names(options, LayerOptions)
    options.setdefault("layers", "all")
    return Embed(to_messages(inputs), embed_options(**options))


def embed_stream(options: EmbedOptions) -> pb.EmbedOptions:
    """Returns what `Client.embed_stream` asks of each item."""
    check_names(options, EmbedOptions)
    return embed_options(**options)


PASSING: Final = (UnavailableError, DeadlineExceededError, ResourceExhaustedError)
"""Errors that `wait_until_ready` waits out."""


class Waiting:
    """How long `wait_until_ready` still waits, and how long between two attempts."""

    def __init__(self, timeout_s: float) -> None:
        """Takes how long to wait, in seconds."""
        self._timeout_s = timeout_s
        self._ends_at = time.monotonic() + timeout_s

    @property
    def left_s(self) -> float:
        """How many seconds the next attempt may take."""
        return max(self._ends_at - time.monotonic(), _WAITING_PAUSE_S)

    def pause_s(self, error: LayertapError) -> float:
        """Returns how long to wait after a failed attempt, in seconds.

        Raises:
            DeadlineExceededError: There is no time for another one.
        """
        pause_s = error.retry_after_s or _WAITING_PAUSE_S
        if time.monotonic() + pause_s >= self._ends_at:
            raise DeadlineExceededError(f"not ready within {self._timeout_s} s: {error.details}") from error
        return pause_s


def read_whole(raw: bytes, kind: type[ResponseT]) -> ResponseT:
    """Parses a unary response."""
    try:
        return kind.FromString(raw)
    except Exception as exc:
        raise DataLossError(f"the answer is no {kind.DESCRIPTOR.name}; is this a layertap server?") from exc


def _sentence_config(message: pb.GetModelInfoResponse) -> SentenceConfig:
    config = message.sentence_config
    poolings = [_STRATEGY_NAMES.get(strategy) for strategy in config.strategies]
    unsupported: str | None = config.unsupported
    if not poolings or None in poolings:
        unsupported = unsupported or "the server does not tell, or not in words that this client knows"
    return SentenceConfig(
        poolings=tuple(pooling for pooling in poolings if pooling),
        normalize=config.normalize,
        truncate_dim=config.dimensions or None,
        max_length=config.max_length,
        truncation="left" if config.truncation == pb.TRUNCATION_LEFT else "right",
        lower_case=config.lower_case,
        prompts=dict(config.prompts),
        default_prompt_name=config.default_prompt_name or None,
        include_prompt=config.include_prompt,
        unsupported=unsupported or None,
    )
