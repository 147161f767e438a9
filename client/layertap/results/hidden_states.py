"""The requested layers of hidden states, each with the rows of all texts."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from layertap import _repr
from layertap.results import export
from layertap.results.held_layers import HeldLayers
from layertap.types import FloatArray


class HiddenStates(HeldLayers):
    """The token rows of the requested layers, like transformers' `hidden_states` tuple.

    Indexed by layer number, absolute or negative: `hidden_states[0]` is the embedding output and
    `hidden_states[-1]` the last layer of the *model*, whichever layers are held. Slices run over layer
    numbers too. Iterates over the held layers in ascending order; `len` is how many are held.
    Each item: Shape: [text_count, length, hidden_size], rows past a text's token count are 0.

    Attributes:
        token_counts: Shape: [text_count].
        layer_count: The encoder blocks of the model.
    """

    __slots__ = ()

    _option: ClassVar[str] = "layers"
    _first_is_input: ClassVar[bool] = True

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

    def ragged(self, layer: int) -> list[FloatArray]:
        """Returns views of one layer, one a text. Shape of each: [token_count, hidden_size].

        Raises:
            IndexError: if the layer is not held.
        """
        return self._split(layer)

    def _text(self, index: int) -> HiddenStates:
        """Returns the held layers of one text."""
        counts = self.token_counts[index : index + 1]
        return HiddenStates(ragged=self._rows_of(index), token_counts=counts, layer_count=self.layer_count)

    def _columns(self) -> list[export.Column]:
        """Returns the held layers as columns of a table, one row a text."""
        return [
            export.Column(name=f"layer_{layer}", values=rows, counts=self.token_counts)
            for layer, rows in self._ragged.items()
        ]

    def _summary(self) -> list[tuple[str, str]]:
        """Returns the held layers in words, and the dtype and shape of each; nothing if none is held."""
        for rows in self._ragged.values():
            return [("layers", _repr.layers(self.layers)), ("each", _repr.array(self._shape(rows), rows.dtype))]
        return []

    def _shape(self, rows: FloatArray) -> tuple[int, int, int]:
        return len(self.token_counts), int(self.token_counts.max(initial=0)), rows.shape[1]

    def _pad(self, layer: int) -> FloatArray:
        rows = self._ragged[layer]
        shape = self._shape(rows)
        if shape[0] * shape[1] == len(rows):
            return rows.reshape(shape)
        padded = np.zeros(shape, rows.dtype)
        for text, own in zip(padded, self.ragged(layer), strict=True):
            text[: len(own)] = own
        return padded
