"""The words of texts with one vector each, and the rows of mixes of layers."""

from __future__ import annotations

import dataclasses
from typing import Any, Final, TypeVar

import numpy as np

from layertap import _repr
from layertap.results import export
from layertap.results.by_text import ByText
from layertap.results.hidden_states import HiddenStates
from layertap.types import FloatArray, IntArray

_T = TypeVar("_T")

NO_MIX: Final = 'no mix was requested; pass mix=LayerMix("mean", layers=[-4, -3, -2, -1]) or another'


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class MixedRows(ByText):
    """The rows of one mix of layers: one a token, or one a word in `Words.mixed`.

    Attributes:
        layers: The layers in it, absolute, in the order of the mix.
    """

    layers: tuple[int, ...]
    _states: HiddenStates

    @property
    def padded(self) -> FloatArray:
        """The rows of all texts. Shape: [text_count, length, row_size]; rows past a text's own are 0."""
        return self._states[self._states.layers[0]]

    def ragged(self) -> list[FloatArray]:
        """Returns views of the rows, one a text. Shape of each: [row_count, row_size]."""
        return self._states.ragged(self._states.layers[0])

    def __len__(self) -> int:
        """The number of texts."""
        return len(self._states.token_counts)

    def _text(self, index: int) -> MixedRows:
        return MixedRows(layers=self.layers, _states=self._states._text(index))

    def _columns(self) -> list[export.Column]:
        """Returns the rows as the column of a table, one row a text."""
        return [dataclasses.replace(column, name="mixed") for column in self._states._columns()]

    def _summary(self) -> list[tuple[str, str]]:
        """Returns the layers of the mix in words, and the dtype and shape of its rows."""
        return [("layers", _repr.layers(self.layers)), *self._states._summary()[1:]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Words(ByText):
    """The words of the texts: where they are, and one vector each for each requested layer.

    Indexed by layer number like `HiddenStates`: `words[-1]` are the vectors of the model's last layer, padded.
    Each item: Shape: [text_count, most words of a text, row_size], rows past a text's own words are 0.

    A text that came as a list of words has exactly one row for each of them; a word of no pieces, or one that was cut
    away, has a row of zeros and a piece count of 0. Of a str there are the words that the tokenizer finds and that
    truncation has left; of a pair those of the first string, then those of the second.

    Attributes:
        word_counts: Shape: [text_count]; rows of each text.
        piece_counts: One array a text: how many tokens make each word. Shape: [word_count].
        offsets: One array a text: start and end of each word in its string (of a word that was given: in that word),
            in Unicode code points. Shape: [word_count, 2].
        sequence_ids: One array a text: 1 for words of the second string of a pair, else 0. Shape: [word_count].
        strings: The words of each text as they stand in it, those of a prompt included; of a text that came as words,
            those words.
    """

    word_counts: IntArray
    piece_counts: tuple[IntArray, ...]
    offsets: tuple[IntArray, ...]
    sequence_ids: tuple[IntArray, ...]
    strings: tuple[tuple[str, ...], ...]
    _states: HiddenStates
    _mixed: MixedRows | None

    @property
    def layers(self) -> tuple[int, ...]:
        """The held layers, absolute, ascending."""
        return self._states.layers

    @property
    def mixed(self) -> MixedRows:
        """The mix of layers, one row a word.

        Raises:
            LookupError: if it was not requested.
        """
        return requested(self._mixed, NO_MIX)

    def __getitem__(self, layer: int) -> FloatArray:
        """Returns the vectors of one layer, padded. Shape: [text_count, most words of a text, row_size].

        Raises:
            IndexError: if the layer is not held.
        """
        return self._states[layer]

    def ragged(self, layer: int) -> list[FloatArray]:
        """Returns views of one layer, one a text. Shape of each: [word_count, row_size].

        Raises:
            IndexError: if the layer is not held.
        """
        return self._states.ragged(layer)

    def __len__(self) -> int:
        """The number of texts."""
        return len(self.word_counts)

    def _text(self, index: int) -> Words:
        names = ("word_counts", "piece_counts", "offsets", "sequence_ids", "strings")
        own: dict[str, Any] = {name: getattr(self, name)[index : index + 1] for name in names}
        mixed = None if self._mixed is None else self._mixed._text(index)
        return Words(**own, _states=self._states._text(index), _mixed=mixed)

    def _columns(self) -> list[export.Column]:
        """Returns the words as columns of a table, one row a text."""
        columns = [*self._states._columns(), *([] if self._mixed is None else self._mixed._columns())]
        offsets = np.concatenate([np.zeros((0, 2), np.int64), *self.offsets])
        return [
            export.Column(name="word_counts", values=self.word_counts),
            export.Column(name="word_offsets", values=offsets, counts=self.word_counts),
            *(dataclasses.replace(column, name=f"words_{column.name}") for column in columns),
        ]

    def _summary(self) -> list[tuple[str, str]]:
        """Returns in words how many there are, of which layers, and the dtype and shape of each."""
        mixed = [] if self._mixed is None else [("mixed", self._mixed._summary()[-1][1])]
        return [("word_count", str(int(self.word_counts.sum()))), *self._states._summary(), *mixed]


def requested(value: _T | None, otherwise: str) -> _T:
    """Returns an output, or raises a LookupError that says how to ask for it."""
    if value is None:
        raise LookupError(otherwise)
    return value
