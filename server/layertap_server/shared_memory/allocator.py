"""Where the engine writes the rows of one call that uses shared memory."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence

from layertap_server.shared_memory.segment import Lending
from layertap_server.types import Allocator, Plan, Text


def allocator(lending: Lending | None, plan: Plan, texts: Sequence[Text] = ()) -> Allocator | None:
    """Returns an allocator that has buffers in shared memory while there is room.

    Args:
        lending: What the call may use. None: nothing, and so there is no allocator.
        plan: What is asked of the texts.
        texts: All texts of the call, if they are known: then each tensor gets one place for all of them, whichever
            batches they are computed in, and the caller need not put them together.
    """
    return None if lending is None else _SharedAllocator(plan, lending, texts)


class _SharedAllocator:
    """The places of the tensors of one call. It may be called from any instance."""

    def __init__(self, plan: Plan, lending: Lending, texts: Sequence[Text]) -> None:
        self._plan, self._lending = plan, lending
        self._starts = {
            output.unit: list(itertools.accumulate(output.row_counts(texts), initial=0)) for output in plan.outputs
        }
        size = sum(map(plan.byte_counts.of, texts))
        # A larger call would keep room that its own first layers could soon give back.
        self._whole = 0 < size <= lending.segment.byte_count // 2
        self._lock = threading.Lock()

    def __call__(self, first_text: int, output_index: int, layer: int, byte_count: int) -> memoryview | None:
        if self._whole:
            kept, output = self._lending.kept, self._plan.outputs[output_index]
            starts = self._starts[output.unit]
            row_bytes = self._plan.row_bytes(output)
            with self._lock:
                if (output_index, layer) not in kept:
                    kept[output_index, layer] = self._lending.allocate(starts[-1] * row_bytes)
                whole = kept.get((output_index, layer))  # The call may have ended in this moment.
            if whole is not None:
                start = starts[first_text] * row_bytes
                return whole[start : start + byte_count]
        return self._lending.allocate(byte_count)
