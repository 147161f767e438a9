"""What comes out: hidden states, pools, streamed rows, with their shapes.

Rows are kept *ragged* (texts one after the other, divided by `token_counts`), because that is how they travel and how
they use least memory; the padded arrays that transformers would give are made when asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np

from layertap.errors import LayertapError
from layertap.types import BoolArray, FloatArray, IntArray, ModelRef, Timings, Tokens


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
