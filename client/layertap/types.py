"""Options that users pass (poolings, mixes, token ids), and what servers say of each answer and of what they accept.

Frozen, slotted, picklable; no I/O, no protobuf. The arrays of answers are in `results`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from layertap import _repr

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float32] | npt.NDArray[np.float16]
"""float32, or float16 where `dtype="float16"` was requested."""

DtypeName: TypeAlias = Literal["float32", "float16", "bfloat16"]
"""A number format on the wire."""

TruncationName: TypeAlias = Literal["error", "right", "left"]
"""What happens to a text of more than `max_length` tokens: an error, or the side that is cut."""

SideName: TypeAlias = Literal["right", "left"]
"""A side of a text."""

PoolingName: TypeAlias = Literal["mean", "cls", "max", "last", "mean_sqrt_len", "mean_max"]
"""How the rows of a text become one vector."""

WordPoolingName: TypeAlias = Literal["first", "last", "mean", "first_last"]
"""How the rows of a word's tokens become one row."""

SpanUnitName: TypeAlias = Literal["characters", "tokens"]
"""What the bounds of spans count."""

MixName: TypeAlias = Literal["mean", "sum", "concat", "weighted"]
"""How several layers become one."""

ITEM_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of one value of each `DtypeName`."""


@dataclasses.dataclass(frozen=True, slots=True)
class LayerMix:
    """Several layers as one: whatever is then made of its rows is made of the mix.

    Attributes:
        strategy: "mean", "sum", "concat" (one after the other, as many times as wide) or "weighted" (the sum of each
            layer times its weight).
        layers: "all", a layer number, or several, each layer once. Their order is that of "concat" and of the weights.
        weights: For "weighted" one for each layer, used as they are, whatever their sum.
    """

    strategy: MixName
    layers: Literal["all"] | int | Sequence[int]
    weights: npt.ArrayLike | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Pooling:
    """How the token rows of a text become one vector.

    Attributes:
        strategy: "mean", "cls" (row 0), "max", "last" (the last pooled row), "mean_sqrt_len"
            (sum / sqrt(count)) or "mean_max" ([mean; max], twice as wide).
        layer: The layer that is pooled, -L-1 to L, or a `LayerMix`.
        include_special_tokens: Whether the tokens that the tokenizer adds, such as [CLS] and [SEP], take part.
            That for unknown words always does.
        normalize: Divides the vector by its Euclidean length, after `dimensions`.
        dimensions: Keeps the first values only; None keeps all.
    """

    strategy: PoolingName
    layer: int | LayerMix = -1
    include_special_tokens: bool = True
    normalize: bool = False
    dimensions: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Windows:
    """Lets texts of more than `max_length` tokens run as windows that overlap; the answer is that of one text.

    The windows are those of transformers' `return_overflowing_tokens`. Each token has one row, from the window in which
    the nearer edge is farthest from it. A text that fits is computed as without windows.

    Attributes:
        stride: How many tokens two windows have in common, special tokens not counted.
    """

    stride: int = 128


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Spanned:
    """A text of which some spans have vectors of their own, made of its tokens in the whole text (late chunking).

    Attributes:
        text: The text: whatever else an input may be.
        spans: Start and end of each, the end not included; they may overlap. Shape: [span_count, 2].
        unit: What they count: "characters" of a str, in Unicode code points and without its prompt, or "tokens",
            special ones included.
    """

    text: Any
    spans: npt.ArrayLike
    unit: SpanUnitName = "characters"


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class TokenIds(_repr.Shown):
    """Token ids to embed exactly as given: every position, padding included, nothing added or cut.

    Attributes:
        input_ids: Shape: [token_count] for one text, [text_count, length] for a batch.
        attention_mask: Shape: as input_ids, each 0 or 1. None: all 1.
        token_type_ids: Shape: as input_ids. None: all 0.
    """

    input_ids: npt.ArrayLike
    attention_mask: npt.ArrayLike | None = None
    token_type_ids: npt.ArrayLike | None = None

    def _summary(self) -> list[tuple[str, str]]:
        """Returns shapes, and numbers only if there are few."""
        return [(field.name, _repr.brief(getattr(self, field.name))) for field in dataclasses.fields(self)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """The model that answered.

    Attributes:
        model_id: Its name.
        fingerprint: sha256 over weights, tokenizer, configuration and compute dtype, in hex.
    """

    model_id: str
    fingerprint: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Timings(_repr.Shown):
    """How long the parts of the work took, in nanoseconds.

    Attributes:
        queue_time_ns: From admission to the start of the first batch.
        tokenize_time_ns: The request's own tokenizing.
        compute_time_ns: Wall time of the batches it shared, undivided.
    """

    queue_time_ns: int
    tokenize_time_ns: int
    compute_time_ns: int

    def _summary(self) -> list[tuple[str, str]]:
        """Returns milliseconds."""
        times = dataclasses.asdict(self).items()
        return [(name.removesuffix("_time_ns"), f"{ns / 1e6:.3g} ms") for name, ns in times]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Limits(_repr.Shown):
    """The server's bounds; a request above them is refused. 0: the server does not say.

    Attributes:
        max_text_count: Texts in one request; `embed_stream` has no such limit.
        max_character_count: Unicode code points in one text.
        max_request_bytes: Bytes of one request message.
        max_response_bytes: Bytes of one unary answer.
        max_frame_bytes: Bytes of one streamed message.
        max_queue_text_count: Texts waiting in the queue.
        max_queue_token_count: Tokens waiting in the queue.
        max_output_bytes: Bytes of computed but unsent tensors, all calls together.
        max_concurrent_call_count: Calls under way at once.
        max_call_output_bytes: Bytes of computed but unsent tensors of one call.
        max_queue_bytes: Bytes of the requests of all calls under way, streams aside.
        stall_time_ns: How long an answer may stay unread, in nanoseconds.
        grace_time_ns: How long calls may take to finish when the server stops or a connection is too old.
        max_connection_age_ns: When a connection is too old, in nanoseconds; 0: never.
        max_window_count: Windows of one text.
    """

    max_text_count: int
    max_character_count: int
    max_request_bytes: int
    max_response_bytes: int
    max_frame_bytes: int
    max_queue_text_count: int
    max_queue_token_count: int
    max_output_bytes: int
    max_concurrent_call_count: int
    max_call_output_bytes: int
    max_queue_bytes: int
    stall_time_ns: int
    grace_time_ns: int
    max_connection_age_ns: int
    max_window_count: int

    def _summary(self) -> list[tuple[str, str]]:
        """Returns the bounds of one request; the table of `ModelInfo` and the fields have all."""
        names = ("max_text_count", "max_character_count", "max_request_bytes", "max_response_bytes")
        return [(name, str(getattr(self, name))) for name in names]
