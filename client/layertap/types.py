"""The things a user holds: what goes in, what comes out, with their shapes.

Rules: frozen, slotted, picklable; names are those of transformers; no I/O, no protobuf. Rows are kept
*ragged* (texts one after the other, divided by `token_counts`), because that is how they travel and how
they use least memory; the padded arrays that transformers would give are made when asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from layertap.errors import LayertapError

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float32] | npt.NDArray[np.float16]
"""float32, or float16 where `dtype="float16"` was asked for."""


@dataclasses.dataclass(frozen=True, slots=True)
class Pooling:
    """How the token rows of a text become one vector.

    Attributes:
        strategy: "mean", "cls" (row 0), "max", "last" (the last pooled row), "mean_sqrt_len"
            (sum / sqrt(count)) or "mean_max" ([mean; max], twice as wide).
        layer: The layer that is pooled, -L-1 to L.
        include_special_tokens: Whether [CLS], [SEP] and the like take part.
        normalize: Divides the vector by its Euclidean length, after `dimensions`.
        dimensions: Keeps the first values only; None keeps all.
    """

    strategy: str
    layer: int = -1
    include_special_tokens: bool = True
    normalize: bool = False
    dimensions: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TokenIds:
    """Token ids to embed exactly as given: every position, padding included, nothing added or cut.

    Attributes:
        input_ids: Shape: [token_count] for one text, [text_count, length] for a batch.
        attention_mask: Shape: as input_ids, each 0 or 1. None: all 1.
        token_type_ids: Shape: as input_ids. None: all 0.
    """

    input_ids: npt.ArrayLike
    attention_mask: npt.ArrayLike | None = None
    token_type_ids: npt.ArrayLike | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokens:
    """Texts as tokens, rectangular. `length` is that of the longest text, or `pad_to` if that is more.

    A `Tokens` can be embedded. Padding that `pad_to` asked for counts as rows of its text and is
    computed; padding that is there only to make the arrays rectangular is not.

    Attributes:
        tokens: The pieces of each text, padding included up to its token_counts.
        input_ids: Shape: [text_count, length].
        attention_mask: Shape: [text_count, length]; 1 for tokens, 0 for padding.
        token_type_ids: Shape: [text_count, length].
        special_tokens_mask: Shape: [text_count, length]; 1 for special tokens and padding.
        word_ids: Shape: [text_count, length]; -1 for special tokens and padding.
        offset_mapping: Shape: [text_count, length, 2]; start and end in Unicode code points.
        token_counts: Shape: [text_count]; how many positions of each text are to be embedded.
        truncated: Shape: [text_count]; whether tokens were cut.
    """

    tokens: list[list[str]]
    input_ids: IntArray
    attention_mask: IntArray
    token_type_ids: IntArray
    special_tokens_mask: IntArray
    word_ids: IntArray
    offset_mapping: IntArray
    token_counts: IntArray
    truncated: BoolArray

    def __len__(self) -> int:
        """The number of texts."""
        return len(self.token_counts)

    def __repr__(self) -> str:
        """Shapes, never a page of numbers."""
        return f"Tokens(text_count={len(self)}, length={self.input_ids.shape[1]})"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """Which model answered.

    Attributes:
        model_id: Its name.
        fingerprint: sha256 over weights, tokenizer, configuration and compute dtype, in hex.
    """

    model_id: str
    fingerprint: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the time went, in nanoseconds.

    Attributes:
        queue_time_ns: From admission to the start of the first batch.
        tokenize_time_ns: The request's own tokenizing.
        compute_time_ns: Wall time of the batches it shared, undivided.
    """

    queue_time_ns: int
    tokenize_time_ns: int
    compute_time_ns: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The served model.

    Attributes:
        model_id: Its name.
        fingerprint: sha256 over weights, tokenizer, configuration and compute dtype, in hex.
        model_type: The architecture; "bert".
        layer_count: L; there are L + 1 layers, 0 to L.
        hidden_size: Values a token row has.
        attention_head_count: Heads of each attention.
        vocab_size: Ids are below this.
        type_vocab_size: Token types are below this.
        max_length: The most tokens of one text, special tokens counted.
        has_pooler_output: Whether the model has pooler weights.
        compute_dtype: What the server computes in: "float32", "float16" or "bfloat16".
        devices: Where it computes, such as ("cpu",).
        special_token_ids: Ids that `include_special_tokens=False` leaves out, ascending.
        pad_token_id: The id that padding uses.
        limits: The bounds in force.
        server_version: The version of the server.
    """

    model_id: str
    fingerprint: str
    model_type: str
    layer_count: int
    hidden_size: int
    attention_head_count: int
    vocab_size: int
    type_vocab_size: int
    max_length: int
    has_pooler_output: bool
    compute_dtype: str
    devices: tuple[str, ...]
    special_token_ids: tuple[int, ...]
    pad_token_id: int
    limits: Limits
    server_version: str


class HiddenStates:
    """The token rows of the layers that were asked for, like transformers' `hidden_states` tuple.

    Indexed by layer number, absolute or negative: `hidden_states[0]` is the embedding output and
    `hidden_states[-1]` the last layer of the *model*, whichever layers are held. Slices run over layer
    numbers too. Iterates over the held layers in ascending order; `len` is how many are held.
    Each item: Shape: [text_count, length, hidden_size], rows past a text's token count are 0.
    """

    __slots__ = ("_padded", "_ragged", "layer_count", "token_counts")

    def __init__(self, *, ragged: dict[int, FloatArray], token_counts: IntArray, layer_count: int) -> None:
        """Takes one array for each held layer. Shape: [sum of token_counts, hidden_size]."""
        self._ragged = ragged
        self._padded: dict[int, FloatArray] = {}
        self.token_counts = token_counts
        self.layer_count = layer_count

    @property
    def layers(self) -> tuple[int, ...]:
        """The held layers, absolute, ascending."""
        return tuple(self._ragged)

    @overload
    def __getitem__(self, layer: int) -> FloatArray: ...
    @overload
    def __getitem__(self, layer: slice) -> tuple[FloatArray, ...]: ...
    def __getitem__(self, layer: int | slice) -> FloatArray | tuple[FloatArray, ...]:
        """Returns one layer, padded. Shape: [text_count, length, hidden_size].

        Raises:
            IndexError: The layer is not held.
        """
        if isinstance(layer, slice):
            return tuple(self[k] for k in range(self.layer_count + 1)[layer])
        absolute = self._absolute(layer)
        if absolute not in self._padded:
            self._padded[absolute] = self._pad(self._ragged[absolute])
        return self._padded[absolute]

    def __iter__(self) -> Iterator[FloatArray]:
        """Yields the held layers in ascending order, padded."""
        return (self[layer] for layer in self._ragged)

    def __len__(self) -> int:
        """The number of held layers."""
        return len(self._ragged)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the ragged rows only; padded arrays are made again."""
        return _hidden_states, (self._ragged, self.token_counts, self.layer_count)

    def __repr__(self) -> str:
        """Shapes, never a page of numbers."""
        return f"HiddenStates(layers={self.layers}, text_count={len(self.token_counts)})"

    def ragged(self, layer: int) -> list[FloatArray]:
        """Returns views of one layer, one a text. Shape of each: [token_count, hidden_size]."""
        rows = self._ragged[self._absolute(layer)]
        ends = np.cumsum(self.token_counts)
        return [rows[end - count : end] for end, count in zip(ends, self.token_counts, strict=True)]

    def _absolute(self, layer: int) -> int:
        absolute = layer + self.layer_count + 1 if layer < 0 else layer
        if absolute not in self._ragged:
            held = ", ".join(map(str, self._ragged)) or "none"
            raise IndexError(f"layer {layer} is not held (held: {held}); ask for it with layers=[{layer}]")
        return absolute

    def _pad(self, rows: FloatArray) -> FloatArray:
        text_count, length = len(self.token_counts), int(self.token_counts.max(initial=0))
        if text_count * length == len(rows):
            return rows.reshape(text_count, length, rows.shape[1])
        padded = np.zeros((text_count, length, rows.shape[1]), rows.dtype)
        end = 0
        for text, count in zip(padded, self.token_counts, strict=True):
            text[:count] = rows[end : end + count]
            end += count
        return padded


def _hidden_states(ragged: dict[int, FloatArray], token_counts: IntArray, layer_count: int) -> HiddenStates:
    return HiddenStates(ragged=ragged, token_counts=token_counts, layer_count=layer_count)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Embedding:
    """What one request gave, as transformers would name it. Arrays are C-contiguous and writable.

    Attributes:
        hidden_states: The layers that were asked for; see `HiddenStates`.
        pools: One array for each asked-for pooling, in request order. Shape: [text_count, pool_size].
        token_counts: Shape: [text_count]; rows of each text.
        truncated: Shape: [text_count]; whether tokens were cut.
        attention_mask: Shape: [text_count, length]; as sent for token ids, else 1 for each token.
        model: Which model answered.
        timings: Where the time went.
    """

    hidden_states: HiddenStates
    pools: tuple[FloatArray, ...]
    token_counts: IntArray
    truncated: BoolArray
    attention_mask: IntArray
    model: ModelRef
    timings: Timings
    _pooler_output: FloatArray | None
    _tokens: Tokens | None

    @property
    def layers(self) -> tuple[int, ...]:
        """The held layers of hidden_states, absolute, ascending."""
        return self.hidden_states.layers

    @property
    def last_hidden_state(self) -> FloatArray:
        """The last layer, padded. Shape: [text_count, length, hidden_size].

        Raises:
            IndexError: It was not asked for.
        """
        return self.hidden_states[-1]

    @property
    def pooler_output(self) -> FloatArray:
        """The model's pooler. Shape: [text_count, hidden_size].

        Raises:
            LookupError: It was not asked for.
        """
        if self._pooler_output is None:
            raise LookupError("pooler_output was not asked for; pass pooler_output=True")
        return self._pooler_output

    @property
    def pooled(self) -> FloatArray:
        """The vectors of the only pooling. Shape: [text_count, pool_size].

        Raises:
            LookupError: There is not exactly one pooling.
        """
        if len(self.pools) != 1:
            hint = "read them from .pools" if self.pools else 'pass pooling="mean" or another strategy'
            raise LookupError(f"{len(self.pools)} poolings were asked for; {hint}")
        return self.pools[0]

    @property
    def tokens(self) -> Tokens:
        """The tokens of the texts.

        Raises:
            LookupError: They were not asked for.
        """
        if self._tokens is None:
            raise LookupError("tokens were not asked for; pass return_tokens=True")
        return self._tokens

    def ragged(self, layer: int) -> list[FloatArray]:
        """Returns views of one layer, one a text. Shape of each: [token_count, hidden_size].

        Raises:
            IndexError: The layer is not held.
        """
        return self.hidden_states.ragged(layer)

    def to_tuple(self) -> tuple[FloatArray | tuple[FloatArray, ...], ...]:
        """Returns (last_hidden_state, pooler_output, hidden_states), less what was not asked for."""
        parts: list[FloatArray | tuple[FloatArray, ...]] = []
        if self.hidden_states.layer_count in self.layers:
            parts.append(self.last_hidden_state)
        if self._pooler_output is not None:
            parts.append(self._pooler_output)
        if self.layers:
            parts.append(tuple(self.hidden_states))
        return tuple(parts)

    def __len__(self) -> int:
        """The number of texts."""
        return len(self.token_counts)

    def __repr__(self) -> str:
        """Shapes, never a page of numbers."""
        pools = [pool.shape for pool in self.pools]
        return f"Embedding(text_count={len(self)}, layers={self.layers}, pools={pools}, model={self.model.model_id!r})"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerRows:
    """Some texts of one layer, as they arrived.

    Attributes:
        layer: The absolute layer.
        texts: The positions of the covered texts in the request.
        rows: One array for each of them. Shape: [token_count, hidden_size].
    """

    layer: int
    texts: range
    rows: Sequence[FloatArray]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StreamResult:
    """The answer to one item of `embed_stream`: an embedding of one text, or an error.

    Attributes:
        index: The position of the item in what was given, from 0.
        error: Why there is no embedding; None if there is one.
    """

    index: int
    error: LayertapError | None
    _embedding: Embedding | None

    @property
    def embedding(self) -> Embedding:
        """The embedding, with text_count 1.

        Raises:
            LayertapError: The item's own error.
        """
        if self._embedding is None:
            raise self.error or LayertapError("the item has no embedding")
        return self._embedding
