"""One output that a request asks for, resolved for one model: what its rows are made of and stand for."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from layertap_server.types.text import Text
from layertap_server.types.windows import Window


class OutputKind(enum.Enum):
    """What an output is made of."""

    HIDDEN_STATES = enum.auto()
    POOLER_OUTPUT = enum.auto()
    POOLED_VECTORS = enum.auto()
    WORD_VECTORS = enum.auto()
    ATTENTIONS = enum.auto()
    SPAN_VECTORS = enum.auto()


class Unit(enum.Enum):
    """What one row of an output stands for; the contract's RowUnit."""

    TOKEN = enum.auto()
    WORD = enum.auto()
    TEXT = enum.auto()
    TOKEN_PAIR = enum.auto()
    SPAN = enum.auto()


class Mixing(enum.Enum):
    """How several layers become one; the contract's MixStrategy."""

    MEAN = enum.auto()
    SUM = enum.auto()
    CONCAT = enum.auto()
    WEIGHTED = enum.auto()


class WordPooling(enum.Enum):
    """How the rows of a word's tokens become one; the contract's WordPooling."""

    FIRST = enum.auto()
    LAST = enum.auto()
    MEAN = enum.auto()
    FIRST_LAST = enum.auto()


class Strategy(enum.Enum):
    """How token rows become one vector; the contract's PoolingStrategy."""

    MEAN = enum.auto()
    CLS = enum.auto()
    MAX = enum.auto()
    LAST = enum.auto()
    MEAN_SQRT_LEN = enum.auto()
    MEAN_MAX = enum.auto()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """A pooling in full.

    Attributes:
        strategy: How rows become one vector.
        exclude_special_tokens: Whether special tokens take no part; each text then says which they are.
        normalize: Whether the vector is divided by its Euclidean length.
        first_row: The rows before it do not take part: a prompt's.
    """

    strategy: Strategy
    exclude_special_tokens: bool = False
    normalize: bool = False
    first_row: int = 0

    @property
    def takes_all(self) -> bool:
        """Whether it takes all rows of a text that has no attention mask."""
        is_of_many = self.strategy not in (Strategy.CLS, Strategy.LAST)
        return is_of_many and not self.exclude_special_tokens and not self.first_row

    def is_empty(self, text: Text) -> bool:
        """Whether nothing of a text is pooled."""
        whole = text.attention_mask is None and not self.exclude_special_tokens and not self.first_row
        return not whole and not len(self.positions(text))

    def positions(self, text: Text) -> npt.NDArray[np.intp]:
        """Returns the rows of a text that are pooled, ascending. CLS pools the first one whatever its mask."""
        if text.window is not None:
            return self._positions_in_window(text, text.window)
        if self.strategy is Strategy.CLS:
            return np.arange(self.first_row, min(self.first_row + 1, text.token_count))
        special = text.special_tokens_mask if self.exclude_special_tokens else None
        if text.attention_mask is None and special is None:
            rows = np.arange(self.first_row, text.token_count)
        else:
            taken = np.arange(text.token_count) >= self.first_row
            if text.attention_mask is not None:
                taken &= text.attention_mask == 1
            if special is not None:
                taken &= special == 0
            rows = np.flatnonzero(taken)
        return rows[-1:] if self.strategy is Strategy.LAST else rows

    def _positions_in_window(self, text: Text, window: Window) -> npt.NDArray[np.intp]:
        """Returns which of the rows that a window gives are pooled, counted in the window; perhaps none."""
        first, kept = self.first_row - window.start, window.kept
        if self.strategy is Strategy.CLS:
            return np.arange(first, first + (first in kept))
        rows = np.arange(max(first, kept.start), max(first, kept.stop))
        if self.exclude_special_tokens and text.special_tokens_mask is not None:
            rows = rows[text.special_tokens_mask[rows] == 0]
        return rows[-1:] if self.strategy is Strategy.LAST else rows


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Several layers as one.

    Attributes:
        layers: The absolute layers, each once, in the order of the concatenation and of the weights.
        weights: One for each layer, if they are weighted.
        row_size: Values that a row of it has while it is added up, in float32; 0: they do not count.
    """

    mixing: Mixing
    layers: tuple[int, ...]
    weights: tuple[float, ...] = ()
    row_size: int = 0

    @property
    def top(self) -> int:
        """The highest layer, after which the mix is whole."""
        return max(self.layers)


_UNITS: Final = {
    OutputKind.HIDDEN_STATES: Unit.TOKEN,
    OutputKind.WORD_VECTORS: Unit.WORD,
    OutputKind.ATTENTIONS: Unit.TOKEN_PAIR,
    OutputKind.SPAN_VECTORS: Unit.SPAN,
}
"""What the others have is one row a text."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One asked-for output, resolved.

    Attributes:
        layers: The absolute layers after which its rows leave, ascending, without doubles; of a mix its highest.
        pool: The pooling, for pooled vectors; for those of spans that of each span.
        mix: What its rows are made of instead of one layer each. None: of each layer by itself.
        joined_pools: More poolings, whose vectors are joined to that of `pool`; it says what is done to the whole.
        applies_modules: Whether the sentence modules of the model's folder are applied, to token rows and to vectors.
        heads: The attention heads, for attentions: one for each value of a row, in that order.
        pooled_size: Values of a pooled vector before it is cut to `row_size`.
        is_part: Whether a row is only a part of one, which the windows of a text together make: in float32, neither
            cut nor normalized.
        unit: What one row stands for.
    """

    kind: OutputKind
    layers: tuple[int, ...]
    row_size: int
    pool: Pool | None = None
    word_pooling: WordPooling | None = None
    mix: Mix | None = None
    joined_pools: tuple[Pool, ...] = ()
    applies_modules: bool = False
    heads: tuple[int, ...] = ()
    pooled_size: int = 0
    is_part: bool = False
    unit: Unit = dataclasses.field(init=False, compare=False)

    def __post_init__(self) -> None:
        """Looks the unit up once for all texts: the hash of an enumeration is slow."""
        object.__setattr__(self, "unit", _UNITS.get(self.kind, Unit.TEXT))

    def of_windows(self) -> Output:
        """Returns what is asked of each window of a text."""
        if self.unit is Unit.TOKEN:
            return self
        pool = self.pool and dataclasses.replace(self.pool, normalize=False)
        return dataclasses.replace(self, row_size=self.pooled_size or self.row_size, pool=pool, is_part=True)

    @property
    def pools(self) -> tuple[Pool, ...]:
        """All its poolings of whole texts."""
        return () if self.pool is None or self.unit is Unit.SPAN else (self.pool, *self.joined_pools)

    def row_counts(self, texts: Sequence[Text]) -> list[int]:
        """Returns how many rows of each layer each text has."""
        unit = self.unit
        if unit is Unit.TEXT:
            return [1] * len(texts)
        if unit is Unit.TOKEN:
            return [text.row_count for text in texts]
        if unit is Unit.TOKEN_PAIR:
            return [text.token_count**2 for text in texts]
        if unit is Unit.SPAN:
            return [text.span_count for text in texts]
        return [text.word_count for text in texts]
