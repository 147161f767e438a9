"""The server's own words for what is to be done: texts as tokens, the outputs asked of them, and what comes out.

Pure data, with numpy as its only library. The tokenizer makes a `Text`, `protocol` a `Plan`, the batcher a `Run`, the
encoder `Rows`, or one of the two errors that say more of its device than that a batch has failed. Nothing here knows
protobuf, gRPC or torch.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from layertap.errors import LayertapError
from layertap.types import ITEM_BYTES

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


RETRY_FULL_S: Final = 0.5
"""How long a caller should wait, in seconds, before it asks a full server again."""
RETRY_STOPPING_S: Final = 1.0
"""Likewise for a server that is stopping or has lost its engine."""
RETRY_ELSEWHERE_S: Final = 0.0
"""Likewise where another server can go on at once."""


class OutOfMemoryError(Exception):
    """The device has no memory for this batch. A smaller one may fit."""


class DeviceLostError(Exception):
    """The device computes nothing any more, whatever it is given."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Text:
    """One text as the model sees it.

    Attributes:
        input_ids: Shape: [token_count].
        attention_mask: Shape: [token_count], with at least one 0. None: all 1.
        token_type_ids: Shape: [token_count], with at least one not 0. None: all 0.
        special_tokens_mask: Shape: [token_count]; 1 for special tokens. None: no output asks for it, or all 0.
        words: Its words. None: no output asks for them, or it has none.
    """

    input_ids: Ids
    attention_mask: Ids | None = None
    token_type_ids: Ids | None = None
    special_tokens_mask: Ids | None = None
    words: Words | None = None

    @property
    def token_count(self) -> int:
        """How many rows each layer has for this text."""
        return len(self.input_ids)

    @property
    def word_count(self) -> int:
        """How many words it has, as far as they are asked for."""
        return 0 if self.words is None else len(self.words.piece_counts)


class OutputKind(enum.Enum):
    """What an output is made of."""

    HIDDEN_STATES = enum.auto()
    POOLER_OUTPUT = enum.auto()
    POOLED_VECTORS = enum.auto()
    WORD_VECTORS = enum.auto()


class Unit(enum.Enum):
    """What one row of an output stands for; the contract's RowUnit."""

    TOKEN = enum.auto()
    WORD = enum.auto()
    TEXT = enum.auto()


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

    def is_empty(self, text: Text) -> bool:
        """Whether nothing of a text is pooled."""
        whole = text.attention_mask is None and not self.exclude_special_tokens and not self.first_row
        return not whole and not len(self.positions(text))

    def positions(self, text: Text) -> npt.NDArray[np.intp]:
        """Returns the rows of a text that are pooled, ascending. CLS pools the first one whatever its mask."""
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Several layers as one.

    Attributes:
        mixing: How.
        layers: The absolute layers, each once, in the order of the concatenation and of the weights.
        weights: One for each layer, if they are weighted.
    """

    mixing: Mixing
    layers: tuple[int, ...]
    weights: tuple[float, ...] = ()

    @property
    def top(self) -> int:
        """The highest layer, after which the mix is whole."""
        return max(self.layers)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One asked-for output, resolved.

    Attributes:
        kind: What it is.
        layers: The absolute layers after which its rows leave, ascending, without doubles; of a mix its highest.
        row_size: Values a row.
        pool: The pooling, for pooled vectors.
        word_pooling: The pooling of each word, for word vectors.
        mix: What its rows are made of instead of one layer each. None: of each layer by itself.
    """

    kind: OutputKind
    layers: tuple[int, ...]
    row_size: int
    pool: Pool | None = None
    word_pooling: WordPooling | None = None
    mix: Mix | None = None

    @property
    def unit(self) -> Unit:
        """What one row stands for."""
        if self.kind is OutputKind.HIDDEN_STATES:
            return Unit.TOKEN
        return Unit.WORD if self.kind is OutputKind.WORD_VECTORS else Unit.TEXT

    def row_counts(self, texts: Sequence[Text]) -> list[int]:
        """Returns how many rows of each layer each text has."""
        unit = self.unit
        if unit is Unit.TOKEN:
            return [text.token_count for text in texts]
        return [text.word_count for text in texts] if unit is Unit.WORD else [1] * len(texts)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ByteCounts:
    """The bytes of an answer, all outputs and layers together, by what there is a row of."""

    token: int
    word: int
    text: int

    def of(self, text: Text) -> int:
        """Returns the bytes of one text."""
        return self.token * text.token_count + self.word * text.word_count + self.text


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that is asked of each text of a call.

    Attributes:
        outputs: In request order.
        dtype: The number format of the answer.
        return_tokens: Whether the tokens are answered too.
        byte_counts: The answer's bytes for each token, each word and each text.
        has_words: Whether an output has a row for each word.
        excludes_special_tokens: Whether a pool leaves special tokens out.
    """

    outputs: tuple[Output, ...]
    dtype: str
    return_tokens: bool = False
    byte_counts: ByteCounts = dataclasses.field(init=False)
    has_words: bool = dataclasses.field(init=False)
    excludes_special_tokens: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        """Adds up the outputs, once for all texts."""
        sizes = dict.fromkeys(Unit, 0)
        for output in self.outputs:
            sizes[output.unit] += self.row_bytes(output) * len(output.layers)
        byte_counts = ByteCounts(token=sizes[Unit.TOKEN], word=sizes[Unit.WORD], text=sizes[Unit.TEXT])
        object.__setattr__(self, "byte_counts", byte_counts)
        object.__setattr__(self, "has_words", any(output.unit is Unit.WORD for output in self.outputs))
        pools = [output.pool for output in self.outputs if output.pool is not None]
        object.__setattr__(self, "excludes_special_tokens", any(pool.exclude_special_tokens for pool in pools))

    @property
    def depth(self) -> int:
        """The highest layer that is needed."""
        return max(output.layers[-1] for output in self.outputs)

    def pooling_from(self, row: int) -> Plan:
        """Returns the plan with pools that leave out the rows before one."""
        outputs = (
            output
            if output.pool is None
            else dataclasses.replace(output, pool=dataclasses.replace(output.pool, first_row=row))
            for output in self.outputs
        )
        return dataclasses.replace(self, outputs=tuple(outputs))

    def row_bytes(self, output: Output) -> int:
        """Returns the bytes of one row of an output."""
        return output.row_size * ITEM_BYTES[self.dtype]


Allocator: TypeAlias = Callable[[int, int, int, int], "memoryview | None"]
"""Returns a writable host buffer for one tensor of some texts of a call; None: any buffer will do.

Its arguments: the position of the first text, the output's index, the layer, the bytes. Called from any instance.
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """Consecutive texts of one call inside one batch.

    Attributes:
        plan: What is asked of them.
        texts: The texts, in request order.
        first_text: The position of the first in the call.
        allocator: Where their rows are written. None: in any buffer.
    """

    plan: Plan
    texts: Sequence[Text]
    first_text: int = 0
    allocator: Allocator | None = None

    def allocate(self, output_index: int, layer: int, byte_count: int) -> memoryview | None:
        """Returns what the run's allocator has for one layer of one output; None: any buffer will do."""
        if self.allocator is None:
            return None
        return self.allocator(self.first_text, output_index, layer, byte_count)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """One layer of one output for one run, on the host.

    Attributes:
        run_index: Which run of the batch.
        output_index: Which output of the run's plan.
        layer: The absolute layer.
        data: The rows in request order, in the plan's dtype: row-major, little-endian.
        failures: Texts, by position in the run, whose numbers cannot be sent, and why.
    """

    run_index: int
    output_index: int
    layer: int
    data: memoryview
    failures: Mapping[int, LayertapError]


Encode: TypeAlias = Callable[[Sequence[Run]], Iterator[Rows]]
"""Runs a batch: yields every layer of every output of every run once."""
