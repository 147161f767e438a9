"""What the scheduler gives to the engine, and what the engine gives back: runs in, rows out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from layertap.errors import LayertapError
from layertap_server.types.plan import Plan
from layertap_server.types.text import Text

Allocator: TypeAlias = Callable[[int, int, int, int], "memoryview | None"]
"""Returns a writable host buffer for one tensor of some texts of a call; None: any buffer will do.

Its arguments: the position of the first text, the output's index, the layer, the bytes. Called from any instance.
"""


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)  # Not frozen: made for each batch, in half of the time.
class Run:
    """Consecutive texts of one call inside one batch.

    Attributes:
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


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)  # Not frozen: made for each batch, in half of the time.
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


Vectors = npt.NDArray[np.float32]
"""Rows of numbers in float32. Shape: [row_count, row_size]."""

ApplyModules: TypeAlias = Callable[[Vectors], Vectors]
"""Applies the sentence modules of vectors. Shape: [text_count, pooled size] to [text_count, vector_size]."""

Encode: TypeAlias = Callable[[Sequence[Run]], Iterator[Rows | None]]
"""Runs a batch: yields every layer of every output of every run once, and None where it may pause while another batch
runs in the same thread."""
