"""Numbers of the device into host buffers, in the answer's dtype, while later layers compute.

On the CPU a layer is copied once, straight into its buffer. On cuda it is copied into pinned memory on a stream of
its own; events tell when it has arrived, and nothing ever waits for the whole device. Rows that hold NaN, infinity,
or a value too large for the answer's dtype are found here, by the largest magnitude of each.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from layertap.errors import InternalError, LayertapError, OutOfRangeError
from layertap.types import ITEM_BYTES
from layertap_server.engine.output_groups import OutputGroup
from layertap_server.types import Rows

DTYPES: Final = {name: getattr(torch, name) for name in ITEM_BYTES}
"""Torch's dtypes by their names."""
_LIMITS: Final = {"float32": float("inf"), "float16": 65520.0, "bfloat16": 3.3953138e38}
"""From here on a float32 becomes infinite when it is narrowed."""


@dataclasses.dataclass(slots=True)
class _Pending:
    group: OutputGroup
    layer: int
    data: memoryview
    peaks: torch.Tensor
    arrived: Any


class HostCopy:
    """What one batch has computed and not yet handed over."""

    def __init__(self, device: torch.device, allocate: Callable[[int], memoryview] | None) -> None:
        self._pinned = device.type == "cuda"
        self._allocate = allocate or (_pinned if self._pinned else _plain)
        # Torch gives neither streams nor events the types of their arguments.
        self._stream = torch.cuda.Stream(device) if self._pinned else None  # type: ignore[no-untyped-call]
        self._pending: deque[_Pending] = deque()
        self._peaks: tuple[torch.Tensor, torch.Tensor] | None = None

    def take(
        self, values: torch.Tensor, group: OutputGroup, layer: int, *, index: npt.NDArray[np.int64] | None = None
    ) -> None:
        """Starts to bring values to the host.

        Args:
            values: Shape: [row_count, row_size], float32.
            group: The outputs that they are.
            layer: The layer they come from.
            index: The rows to bring, in order; None: all.
        """
        dtype = DTYPES[group.dtype]
        row_count = len(values) if index is None else len(index)
        if not row_count:  # Texts without words; there is nothing that a buffer could hold.
            self._pending.append(_Pending(group, layer, memoryview(b""), torch.empty(0), None))
            return
        peaks = self._row_peaks(values)
        byte_count = row_count * values.shape[1] * dtype.itemsize
        data = None
        if len(group.members) == 1:
            (member,) = group.members
            data = member.run.allocate(member.output_index, layer, byte_count)
        if data is None:
            data = self._allocate(byte_count)
        host = torch.frombuffer(data, dtype=dtype).view(row_count, values.shape[1])
        if index is not None and row_count == len(values) and bool((index == np.arange(row_count)).all()):
            index = None
        chosen = None if index is None else torch.from_numpy(index).to(values.device, non_blocking=True)
        if chosen is not None:
            peaks = peaks.index_select(0, chosen)
        arrived = None
        if self._stream is None:
            if chosen is not None and dtype is torch.float32:
                torch.index_select(values, 0, chosen, out=host)
            else:
                host.copy_(values if chosen is None else values.index_select(0, chosen))
        else:
            sent = (values if chosen is None else values.index_select(0, chosen)).to(dtype)
            self._stream.wait_stream(torch.cuda.current_stream(values.device))
            # First what may fail: a copy under way must be among the pending ones, or its end is not waited for.
            host_peaks = torch.empty(peaks.shape, dtype=peaks.dtype, pin_memory=True)
            with torch.cuda.stream(self._stream):
                host.copy_(sent, non_blocking=True)
                host_peaks.copy_(peaks, non_blocking=True)
                sent.record_stream(self._stream)
                peaks.record_stream(self._stream)
                arrived, peaks = torch.cuda.Event(), host_peaks  # type: ignore[no-untyped-call]
                arrived.record(self._stream)
        self._pending.append(_Pending(group, layer, data, peaks, arrived))

    def done(self) -> Iterator[Rows]:
        """Yields what has arrived, without waiting."""
        while self._pending and (self._pending[0].arrived is None or self._pending[0].arrived.query()):
            yield from _rows(self._pending.popleft())

    def rest(self) -> Iterator[Rows]:
        """Yields all that is left, waiting for each."""
        while self._pending:
            if self._pending[0].arrived is not None:
                self._pending[0].arrived.synchronize()
            yield from _rows(self._pending.popleft())

    def wait(self) -> None:
        """Waits until nothing is being written any more; buffers that are let go of may be lent anew at once."""
        for pending in self._pending:
            if pending.arrived is not None:
                pending.arrived.synchronize()
        self._pending.clear()

    def _row_peaks(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the largest magnitude of each row, NaN where there is one; once for a layer that several share."""
        if self._peaks is None or self._peaks[0] is not values:
            self._peaks = values, torch.linalg.vector_norm(values, ord=float("inf"), dim=1)
        return self._peaks[1]


def _rows(pending: _Pending) -> Iterator[Rows]:
    """Yields what has arrived, portion by portion."""
    group = pending.group
    bad = ~(pending.peaks.numpy() < _LIMITS[group.dtype])
    none_bad = not bad.any()
    shared = len(group.members) > 1
    row = 0
    for member in group.members:
        counts = group.output.row_counts(member.run.texts)
        end = row + sum(counts)
        row_bytes = member.run.plan.row_bytes(group.output)
        # Of a buffer that several share each gets a copy, so that a slow reader does not hold the rows of the others.
        data = memoryview(bytes(pending.data[row * row_bytes : end * row_bytes])) if shared else pending.data
        yield Rows(
            run_index=member.run_index,
            output_index=member.output_index,
            layer=pending.layer,
            data=data,
            failures={} if none_bad else _failures(pending, slice(row, end), counts),
        )
        row = end


def _failures(pending: _Pending, rows: slice, counts: Sequence[int]) -> dict[int, LayertapError]:
    """Returns which texts of a portion cannot be sent, and why."""
    peaks, dtype = pending.peaks.numpy()[rows], pending.group.dtype
    bad = ~(peaks < _LIMITS[dtype])
    text_of_row = np.repeat(np.arange(len(counts)), counts)
    return {
        text: _failure(bool(np.isfinite(peaks[text_of_row == text]).all()), pending.layer, dtype)
        for text in np.unique(text_of_row[bad]).tolist()
    }


def _failure(finite: bool, layer: int, dtype: str) -> LayertapError:
    if finite:
        return OutOfRangeError(f"a value of layer {layer} does not fit {dtype}; ask for dtype float32")
    return InternalError(f"layer {layer} came out as NaN or infinity; the model's weights are at fault, not the text")


def _plain(byte_count: int) -> memoryview:
    return np.empty(byte_count, np.uint8).data.cast("B")


def _pinned(byte_count: int) -> memoryview:
    # Torch keeps freed pinned blocks and lends them again once their copies are over.
    return torch.empty(byte_count, dtype=torch.uint8, pin_memory=True).numpy().data.cast("B")
