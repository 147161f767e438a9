"""One text as the model sees it: its token ids, its masks and its words."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from layertap_server.types.windows import Window, Windows

Ids = npt.NDArray[np.int32]
Indices = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Words:
    """Which tokens of a text make which words. The tokens of a word lie one after the other.

    Attributes:
        starts: Shape: [word_count]; the first token of each word.
        piece_counts: Shape: [word_count]; how many tokens each word has, perhaps none.
        offsets: Shape: [word_count, 2]; start and end in the text, in Unicode code points.
        first_word_count: How many words belong to the first string of a pair; else all.
    """

    starts: Indices
    piece_counts: Indices
    offsets: Indices
    first_word_count: int

    def within(self, first: int, end: int, *, start: int) -> tuple[Indices, Words]:
        """Returns which words have tokens from `first` to before `end`, and those tokens of them, counted from `start`.

        `first_word_count` and `offsets` are not those of the part.
        """
        inside, starts, counts = _within(self.starts, self.piece_counts, first, end)
        part = Words(
            starts=starts - start, piece_counts=counts, offsets=self.offsets[inside], first_word_count=len(inside)
        )
        return inside, part


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spans:
    """Runs of tokens of a text that are pooled by themselves. They may overlap.

    Attributes:
        starts: Shape: [span_count]; the first token of each.
        counts: Shape: [span_count]; how many tokens each has.
    """

    starts: Indices
    counts: Indices

    def within(self, first: int, end: int, *, start: int) -> tuple[Indices, Spans]:
        """Returns which spans have tokens from `first` to before `end`, and these, counted from `start`."""
        inside, starts, counts = _within(self.starts, self.counts, first, end)
        return inside, Spans(starts=starts - start, counts=counts)


def _within(starts: Indices, counts: Indices, first: int, end: int) -> tuple[Indices, Indices, Indices]:
    """Returns which ranges have anything from `first` to before `end`, and where that starts and how much it is."""
    firsts = np.maximum(starts, first)
    left = np.minimum(starts + counts, end) - firsts
    inside = np.flatnonzero((left > 0) & (counts > 0))
    return inside, firsts[inside], left[inside]


@dataclasses.dataclass(slots=True, eq=False)  # Not frozen: one a text is made, in half of the time.
class Text:
    """One text as the model sees it.

    Attributes:
        input_ids: Shape: [token_count].
        attention_mask: Shape: [token_count], with at least one 0. None: all 1.
        token_type_ids: Shape: [token_count], with at least one not 0. None: all 0.
        special_tokens_mask: Shape: [token_count]; 1 for special tokens. None: no output asks for it, or all 0.
        words: Its words. None: no output asks for them, or it has none.
        spans: Its spans. None: no output asks for them, or it has none.
        windows: The windows that it runs as. None: it runs as a whole.
        window: Which tokens of another text it has. None: it is no window.
        whole: That text. None: it is no window.
        word_indices: Which words of the whole text those of a window are.
        span_indices: Likewise for spans.
    """

    input_ids: Ids
    attention_mask: Ids | None = None
    token_type_ids: Ids | None = None
    special_tokens_mask: Ids | None = None
    words: Words | None = None
    spans: Spans | None = None
    windows: Windows | None = None
    window: Window | None = None
    whole: Text | None = None
    word_indices: Indices | None = None
    span_indices: Indices | None = None

    @property
    def token_count(self) -> int:
        """How many tokens it has."""
        return len(self.input_ids)

    @property
    def row_count(self) -> int:
        """How many rows each layer has for this text: one for each token, or of a window for those that it gives."""
        return len(self.input_ids) if self.window is None else self.window.row_count

    @property
    def window_count(self) -> int:
        """How many windows it runs as; 1: as a whole."""
        return 1 if self.windows is None else self.windows.count

    @property
    def computed_token_count(self) -> int:
        """How many tokens are computed for it, those of all its windows."""
        return len(self.input_ids) if self.windows is None else self.windows.computed_token_count

    @property
    def word_count(self) -> int:
        """How many words it has, as far as they are asked for."""
        return 0 if self.words is None else len(self.words.piece_counts)

    @property
    def span_count(self) -> int:
        """How many spans it has, as far as they are asked for."""
        return 0 if self.spans is None else len(self.spans.counts)

    def part(self, index: int) -> Text:
        """Returns one of its windows as a text of its own; of a text that runs as a whole, itself."""
        if self.windows is None:
            return self
        window = self.windows[index]
        taken = [
            slice(0, self.windows.prefix_count),
            slice(self.windows.prefix_count + window.start, self.windows.prefix_count + window.stop),
            slice(self.token_count - self.windows.suffix_count, self.token_count),
        ]

        def cut(values: Ids | None) -> Ids | None:
            return None if values is None else np.concatenate([values[one] for one in taken])

        ids = cut(self.input_ids)
        assert ids is not None
        end = window.first_row + window.row_count
        inside, words, spans_inside, spans = None, None, None, None
        if self.words is not None:
            inside, words = self.words.within(window.first_row, end, start=window.start)
        if self.spans is not None:
            spans_inside, spans = self.spans.within(window.first_row, end, start=window.start)
        return Text(
            ids,
            token_type_ids=cut(self.token_type_ids),
            special_tokens_mask=cut(self.special_tokens_mask),
            words=words,
            spans=spans,
            window=window,
            whole=self,
            word_indices=inside,
            span_indices=spans_inside,
        )
