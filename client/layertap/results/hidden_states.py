"""The requested layers, each with the rows of all texts.

Rows are kept *ragged* (texts one after the other, divided by `token_counts`), which is how they are sent
and what needs least memory; the padded arrays that transformers would return are made at their first use.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from layertap import _repr
from layertap.results import export
from layertap.types import FloatArray, IntArray

if TYPE_CHECKING:
    import torch


class HiddenStates:
    """The token rows of the requested layers, like transformers' `hidden_states` tuple.

    Indexed by layer number, absolute or negative: `hidden_states[0]` is the embedding output and
    `hidden_states[-1]` the last layer of the *model*, whichever layers are held. Slices run over layer
    numbers too. Iterates over the held layers in ascending order; `len` is how many are held.
    Each item: Shape: [text_count, length, hidden_size], rows past a text's token count are 0.
    """

    __slots__ = ("_padded", "_ragged", "layer_count", "token_counts")

    def __init__(self, *, ragged: dict[int, FloatArray], token_counts: IntArray, layer_count: int) -> None:
        """Holds one array for each layer. Shape: [sum of token_counts, hidden_size]."""
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
            IndexError: if the layer is not held.
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
        return _repr.line("HiddenStates", self._summary())

    def _repr_html_(self) -> str:
        return _repr.table("HiddenStates", self._summary())

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """Returns the held layers as one array. Shape: [held layers, text_count, length, hidden_size].

        Raises:
            ValueError: if `copy` is False, and there is not exactly one held layer of that dtype.
        """
        if len(self) == 1:
            return export.as_array(next(iter(self))[None], dtype, copy)
        if copy is False:
            raise ValueError(f"{len(self)} layers become one array by a copy; leave copy=False out, or take one layer")
        return np.array(tuple(self), dtype)

    def to_torch(self) -> tuple[torch.Tensor, ...]:
        """Returns the held layers as tensors that share their memory, like transformers' own `hidden_states`.

        Shape of each: [text_count, length, hidden_size]. The tensor of a read-only array is a copy.

        Raises:
            ModuleNotFoundError: if torch is missing; `layertap[torch]` brings it.
        """
        return tuple(export.to_torch(states) for states in self)

    def ragged(self, layer: int) -> list[FloatArray]:
        """Returns views of one layer, one a text. Shape of each: [token_count, hidden_size]."""
        return export.split(self._ragged[self._absolute(layer)], self.token_counts)

    def _text(self, index: int) -> HiddenStates:
        """Returns the held layers of one text."""
        counts = self.token_counts[index : index + 1]
        start = int(self.token_counts[:index].sum())
        rows = slice(start, start + int(counts[0]))
        ragged = {layer: values[rows] for layer, values in self._ragged.items()}
        return HiddenStates(ragged=ragged, token_counts=counts, layer_count=self.layer_count)

    def _columns(self) -> list[export.Column]:
        """Returns the held layers as columns of a table, one row a text."""
        return [
            export.Column(name=f"layer_{layer}", values=rows, counts=self.token_counts)
            for layer, rows in self._ragged.items()
        ]

    def _summary(self) -> list[tuple[str, str]]:
        """Returns the held layers in words, and the dtype and shape of each; nothing if none is held."""
        for rows in self._ragged.values():
            shape = len(self.token_counts), int(self.token_counts.max(initial=0)), rows.shape[1]
            return [("layers", _repr.layers(self.layers)), ("each", _repr.array(shape, rows.dtype))]
        return []

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
