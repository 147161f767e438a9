"""The server's own words for what is to be done: texts as tokens, the outputs asked of them, and what comes out.

Pure data, with numpy as its only library. The tokenizer makes a `Text`, intake a `Plan`, the batcher a `Run`, the
encoder `Rows`, or one of the two errors that say more of its device than that a batch has failed. Nothing here knows
protobuf, gRPC or torch.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from layertap.errors import LayertapError

Ids = npt.NDArray[np.int32]


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
    """

    input_ids: Ids
    attention_mask: Ids | None = None
    token_type_ids: Ids | None = None

    @property
    def token_count(self) -> int:
        """How many rows each layer has for this text."""
        return len(self.input_ids)


class OutputKind(enum.Enum):
    """What an output is made of."""

    HIDDEN_STATES = enum.auto()
    POOLER_OUTPUT = enum.auto()
    POOLED_VECTORS = enum.auto()


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
        excluded_ids: Token ids that do not take part.
        normalize: Whether the vector is divided by its Euclidean length.
    """

    strategy: Strategy
    excluded_ids: tuple[int, ...] = ()
    normalize: bool = False

    def is_empty(self, text: Text) -> bool:
        """Whether nothing of a text is pooled."""
        unmasked = text.attention_mask is None and not self.excluded_ids
        return not unmasked and not len(self.positions(text))

    def positions(self, text: Text) -> npt.NDArray[np.intp]:
        """Returns the rows of a text that are pooled, ascending. [CLS] pools row 0 whatever its mask."""
        if self.strategy is Strategy.CLS:
            return np.zeros(1, np.intp)
        if text.attention_mask is None and not self.excluded_ids:
            rows = np.arange(text.token_count)
        else:
            taken = np.ones(text.token_count, np.bool_)
            if text.attention_mask is not None:
                taken &= text.attention_mask == 1
            if self.excluded_ids:
                taken &= ~np.isin(text.input_ids, self.excluded_ids)
            rows = np.flatnonzero(taken)
        return rows[-1:] if self.strategy is Strategy.LAST else rows


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One asked-for output, resolved.

    Attributes:
        kind: What it is.
        layers: The absolute layers it is made from, ascending, without doubles.
        row_size: Values a row.
        pool: The pooling, for pooled vectors.
    """

    kind: OutputKind
    layers: tuple[int, ...]
    row_size: int
    pool: Pool | None = None

    @property
    def per_token(self) -> bool:
        """Whether there is one row a token, or one a text."""
        return self.kind is OutputKind.HIDDEN_STATES


ITEM_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that is asked of each text of a call.

    Attributes:
        outputs: In request order.
        dtype: The number format of the answer.
        return_tokens: Whether the tokens are answered too.
        allocate: Where the caller would like its rows; see `Run.allocate`. None: anywhere.
    """

    outputs: tuple[Output, ...]
    dtype: str
    return_tokens: bool = False
    allocate: Callable[[int, int, int, int], memoryview | None] | None = None

    @property
    def depth(self) -> int:
        """The highest layer that is needed."""
        return max(output.layers[-1] for output in self.outputs)

    def row_bytes(self, output: Output) -> int:
        """Returns the bytes of one row of an output."""
        return output.row_size * ITEM_BYTES[self.dtype]

    def byte_counts(self) -> tuple[int, int]:
        """Returns the answer's bytes for each token, and for each text."""
        token_bytes = text_bytes = 0
        for output in self.outputs:
            if output.per_token:
                token_bytes += self.row_bytes(output) * len(output.layers)
            else:
                text_bytes += self.row_bytes(output)
        return token_bytes, text_bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """Consecutive texts of one call inside one batch.

    Attributes:
        plan: What is asked of them.
        texts: The texts, in request order.
        first_text: The position of the first in the call.
    """

    plan: Plan
    texts: Sequence[Text]
    first_text: int = 0

    def allocate(self, output_index: int, layer: int, byte_count: int) -> memoryview | None:
        """Returns a writable host buffer for one layer of one output where the caller would like it; None: anywhere."""
        if self.plan.allocate is None:
            return None
        return self.plan.allocate(self.first_text, output_index, layer, byte_count)


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
