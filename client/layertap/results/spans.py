"""The vectors of spans of texts."""

from __future__ import annotations

import dataclasses

from layertap.results import export
from layertap.results.by_text import ByText
from layertap.results.hidden_states import HiddenStates
from layertap.types import FloatArray, IntArray


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class SpanVectors(ByText):
    """The vectors of the spans of the texts: of each pooling one vector for each span, in the order of the request.

    Attributes:
        span_counts: Shape: [text_count]; spans of each text.
    """

    span_counts: IntArray
    _pools: tuple[HiddenStates, ...]

    @property
    def padded(self) -> FloatArray:
        """The vectors of the only pooling. Shape: [text_count, most spans of a text, size]; the rest is 0.

        Raises:
            LookupError: if there are several poolings.
        """
        states = self._only
        return states[states.layers[0]]

    def ragged(self, pool: int | None = None) -> list[FloatArray]:
        """Returns views of the vectors of one pooling, one a text. Shape of each: [span_count, size].

        Args:
            pool: Which of several poolings, in the order of the request. None: the only one.

        Raises:
            LookupError: if there is no such pooling, or there are several and none is named.
        """
        states = self._only if pool is None else self._pools[pool]
        return states.ragged(states.layers[0])

    @property
    def _only(self) -> HiddenStates:
        if len(self._pools) != 1:
            raise LookupError(f"{len(self._pools)} poolings of spans were requested; read each by .ragged(n)")
        return self._pools[0]

    def __len__(self) -> int:
        """The number of texts."""
        return len(self.span_counts)

    def _text(self, index: int) -> SpanVectors:
        counts = self.span_counts[index : index + 1]
        return SpanVectors(span_counts=counts, _pools=tuple(pool._text(index) for pool in self._pools))

    def _columns(self) -> list[export.Column]:
        """Returns the vectors as columns of a table, one row a text."""
        columns = [export.Column(name="span_counts", values=self.span_counts)]
        for n, pool in enumerate(self._pools):
            columns += [dataclasses.replace(column, name=f"spans_{n}") for column in pool._columns()]
        return columns

    def _summary(self) -> list[tuple[str, str]]:
        """Returns in words how many there are, and the dtype and shape of each pooling."""
        shown = [(f"spans_{n}", pool._summary()[-1][1]) for n, pool in enumerate(self._pools)]
        return [("span_count", str(int(self.span_counts.sum()))), *shown]
