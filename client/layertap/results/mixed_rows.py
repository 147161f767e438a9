"""The rows of several layers that were mixed into one."""

from __future__ import annotations

import dataclasses

from layertap import _repr
from layertap.results import export
from layertap.results.hidden_states import HiddenStates
from layertap.types import FloatArray


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class MixedRows:
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

    def __repr__(self) -> str:
        """Shapes, never a page of numbers."""
        return _repr.line("MixedRows", self._summary())

    def _repr_html_(self) -> str:
        return _repr.table("MixedRows", self._summary())

    def _columns(self) -> list[export.Column]:
        """Returns the rows as the column of a table, one row a text."""
        return [dataclasses.replace(column, name="mixed") for column in self._states._columns()]

    def _summary(self) -> list[tuple[str, str]]:
        """Returns the layers of the mix in words, and the dtype and shape of its rows."""
        return [("layers", _repr.layers(self.layers)), *self._states._summary()[1:]]
