"""The attention probabilities that were requested: where each token looks, by layer and head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from layertap import _repr
from layertap.results import export
from layertap.types import FloatArray, IntArray

if TYPE_CHECKING:
    import torch


class Attentions:
    """The attention probabilities of the requested layers, like transformers' `attentions` tuple.

    Indexed by layer number, absolute or negative: `attentions[0]` is of the first encoder block, which reads
    `hidden_states[0]`, and `attentions[-1]` of the model's last, whichever are held. Iterates over the held layers in
    ascending order; `len` is how many are held. Each item: Shape: [text_count, head_count, length, length], for each
    query (third axis) over all keys (fourth axis); rows and columns past a text's token count are 0.

    Attributes:
        heads: The held heads, absolute, ascending.
        token_counts: Shape: [text_count].
        layer_count: The encoder blocks of the model.
    """

    __slots__ = ("_padded", "_ragged", "heads", "layer_count", "token_counts")

    def __init__(
        self, *, ragged: dict[int, FloatArray], heads: tuple[int, ...], token_counts: IntArray, layer_count: int
    ) -> None:
        """Holds one array for each layer, as it travels. Shape: [sum of token_count², head_count]."""
        self._ragged = ragged
        self._padded: dict[int, FloatArray] = {}
        self.heads = heads
        self.token_counts = token_counts
        self.layer_count = layer_count

    @property
    def layers(self) -> tuple[int, ...]:
        """The held layers, absolute, ascending."""
        return tuple(self._ragged)

    def __getitem__(self, layer: int) -> FloatArray:
        """Returns one layer, padded. Shape: [text_count, head_count, length, length].

        Raises:
            IndexError: if the layer is not held.
        """
        absolute = self._absolute(layer)
        if absolute not in self._padded:
            text_count, length = len(self.token_counts), int(self.token_counts.max(initial=0))
            shape = text_count, len(self.heads), length, length
            padded = np.zeros(shape, self._ragged[absolute].dtype)
            for text, own, count in zip(padded, self.ragged(absolute), self.token_counts, strict=True):
                text[:, :count, :count] = own
            self._padded[absolute] = padded
        return self._padded[absolute]

    def ragged(self, layer: int) -> list[FloatArray]:
        """Returns views of one layer, one a text. Shape of each: [head_count, token_count, token_count].

        Raises:
            IndexError: if the layer is not held.
        """
        parts = export.split(self._ragged[self._absolute(layer)], self.token_counts**2)
        return [
            part.reshape(count, count, len(self.heads)).transpose(2, 0, 1)
            for part, count in zip(parts, self.token_counts.tolist(), strict=True)
        ]

    def __iter__(self) -> Iterator[FloatArray]:
        """Yields the held layers in ascending order, padded."""
        return (self[layer] for layer in self._ragged)

    def __len__(self) -> int:
        """The number of held layers."""
        return len(self._ragged)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles what has travelled only; padded arrays are made again."""
        return _attentions, (self._ragged, self.heads, self.token_counts, self.layer_count)

    def __repr__(self) -> str:
        """Shapes, never a page of numbers."""
        return _repr.line("Attentions", self._summary())

    def _repr_html_(self) -> str:
        return _repr.table("Attentions", self._summary())

    def to_torch(self) -> tuple[torch.Tensor, ...]:
        """Returns the held layers as tensors, like transformers' own `attentions`.

        Shape of each: [text_count, head_count, length, length].

        Raises:
            ModuleNotFoundError: if torch is missing; `layertap[torch]` brings it.
        """
        return tuple(export.to_torch(layer) for layer in self)

    def _text(self, index: int) -> Attentions:
        """Returns the held layers of one text."""
        sizes = self.token_counts**2
        start = int(sizes[:index].sum())
        rows = slice(start, start + int(sizes[index]))
        ragged = {layer: values[rows] for layer, values in self._ragged.items()}
        return _attentions(ragged, self.heads, self.token_counts[index : index + 1], self.layer_count)

    def _columns(self) -> list[export.Column]:
        """Returns the held layers as columns of a table, one row a text: its pairs of tokens, query by query."""
        counts = self.token_counts**2
        layers = [
            export.Column(name=f"attentions_{layer}", values=rows, counts=counts)
            for layer, rows in self._ragged.items()
        ]
        return [export.Column(name="token_pair_counts", values=counts), *layers]

    def _summary(self) -> list[tuple[str, str]]:
        """Returns the held layers and heads in words, and the dtype and shape of each."""
        length = int(self.token_counts.max(initial=0))
        shape = len(self.token_counts), len(self.heads), length, length
        (dtype,) = {rows.dtype for rows in self._ragged.values()}
        return [("layers", _repr.layers(self.layers)), ("each", _repr.array(shape, dtype))]

    def _absolute(self, layer: int) -> int:
        absolute = layer + self.layer_count if layer < 0 else layer
        if absolute not in self._ragged:
            held = ", ".join(map(str, self._ragged))
            raise IndexError(
                f"attentions of layer {layer} are not held (held: {held}); ask for them with attentions=[{layer}]"
            )
        return absolute


def _attentions(
    ragged: dict[int, FloatArray], heads: tuple[int, ...], token_counts: IntArray, layer_count: int
) -> Attentions:
    return Attentions(ragged=ragged, heads=heads, token_counts=token_counts, layer_count=layer_count)
