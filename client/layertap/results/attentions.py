"""The attention probabilities that were requested: where each token looks, by layer and head."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from layertap import _repr
from layertap.results import export
from layertap.results.held_layers import HeldLayers
from layertap.types import FloatArray, IntArray


class Attentions(HeldLayers):
    """The attention probabilities of the requested layers, like transformers' `attentions` tuple.

    Indexed by layer number, absolute or negative: `attentions[0]` is of the first encoder block, which reads
    `hidden_states[0]`, and `attentions[-1]` of the model's last, whichever are held. Slices run over layer numbers too.
    Iterates over the held layers in
    ascending order; `len` is how many are held. Each item: Shape: [text_count, head_count, length, length], for each
    query (third axis) over all keys (fourth axis); rows and columns past a text's token count are 0.

    Attributes:
        heads: The held heads, absolute, in the order of the second axis, which is that of the request.
        token_counts: Shape: [text_count].
        layer_count: The encoder blocks of the model.
    """

    __slots__ = ("heads",)

    _option: ClassVar[str] = "attentions"
    _first_is_input: ClassVar[bool] = False

    def __init__(
        self, *, ragged: dict[int, FloatArray], heads: tuple[int, ...], token_counts: IntArray, layer_count: int
    ) -> None:
        """Holds one array for each layer, as it travels. Shape: [sum of token_count², head_count]."""
        super().__init__(ragged=ragged, token_counts=token_counts, layer_count=layer_count)
        self.heads = heads

    def ragged(self, layer: int) -> list[FloatArray]:
        """Returns views of one layer, one a text. Shape of each: [head_count, token_count, token_count].

        Raises:
            IndexError: if the layer is not held.
        """
        return [
            part.reshape(count, count, len(self.heads)).transpose(2, 0, 1)
            for part, count in zip(self._split(layer), self.token_counts.tolist(), strict=True)
        ]

    @property
    def _row_counts(self) -> IntArray:
        """The pairs of tokens of each text. Shape: [text_count]."""
        return self.token_counts**2

    def _text(self, index: int) -> Attentions:
        """Returns the held layers of one text."""
        counts = self.token_counts[index : index + 1]
        rows = self._rows_of(index)
        return Attentions(ragged=rows, heads=self.heads, token_counts=counts, layer_count=self.layer_count)

    def _columns(self) -> list[export.Column]:
        """Returns the held layers as columns of a table, one row a text: its pairs of tokens, query by query."""
        counts = self._row_counts
        layers = [
            export.Column(name=f"attentions_{layer}", values=rows, counts=counts)
            for layer, rows in self._ragged.items()
        ]
        return [export.Column(name="token_pair_counts", values=counts), *layers]

    def _summary(self) -> list[tuple[str, str]]:
        """Returns the held layers in words, and the dtype and shape of each."""
        (dtype,) = {rows.dtype for rows in self._ragged.values()}
        return [("layers", _repr.layers(self.layers)), ("each", _repr.array(self._shape, dtype))]

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        length = int(self.token_counts.max(initial=0))
        return len(self.token_counts), len(self.heads), length, length

    def _pad(self, layer: int) -> FloatArray:
        padded = np.zeros(self._shape, self._ragged[layer].dtype)
        for text, own in zip(padded, self.ragged(layer), strict=True):
            text[:, : own.shape[1], : own.shape[2]] = own
        return padded
