"""Copies of computed rows into host buffers, in the answer's dtype, while later layers compute.

On the CPU a layer is copied once, straight into its buffer. On an accelerator it is copied into pinned memory beside
the computation; events say when it has arrived, and nothing waits for the whole device. Rows that hold NaN,
infinity, or a value too large for the answer's dtype are found here, by the largest magnitude of each.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import torch

from layertap.errors import LayertapError
from layertap.types import ITEM_BYTES
from layertap_server.engine.output_groups import OutputGroup
from layertap_server.engine.packing import Indices
from layertap_server.engine.runtime import Arrival, Runtime
from layertap_server.engine.upload import Upload
from layertap_server.types import Rows
from layertap_server.types.errors import NARROW_LIMITS, unsendable

DTYPES: Final = {name: getattr(torch, name) for name in ITEM_BYTES}
"""Torch's dtypes by their names."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Pending:
    """Rows that are being copied.

    Attributes:
        group: The outputs that they belong to.
        layer: Their layer.
        data: The buffer that they are copied to.
        peaks: The largest magnitude of each row, once they have arrived. Shape: [row_count].
        arrival: Their arrival. None: they have arrived.
        read: The tensors that the copy reads: they must live until the rows have arrived.
    """

    group: OutputGroup
    layer: int
    data: memoryview
    peaks: torch.Tensor
    arrival: Arrival | None
    read: tuple[torch.Tensor, ...] = ()

    def wait(self) -> None:
        if self.arrival is not None:
            self.arrival.synchronize()


class ChosenRows:
    """Some rows of a batch: a part of it where they lie together, else gathered."""

    def __init__(self, rows: Indices, upload: Upload) -> None:
        """Adds what it needs to the batch's upload. Shape of the indices: [row_count], not empty."""
        self.row_count = len(rows)
        self._first = int(rows[0])
        together = bool((rows == np.arange(self._first, self._first + len(rows))).all())
        self._sent = None if together else upload.add(rows)

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the rows, perhaps as a view."""
        if self._sent is None:
            return values[self._first : self._first + self.row_count]
        return values.index_select(0, self._sent.tensor)

    def write(self, values: torch.Tensor, out: torch.Tensor) -> None:
        """Writes the rows into a tensor of the CPU, of any dtype."""
        if self._sent is not None and out.dtype is values.dtype:
            torch.index_select(values, 0, self._sent.tensor, out=out)
        else:
            out.copy_(self.of(values))


class HostCopy:
    """The copies of one batch; without a runtime the numbers are on the host already."""

    def __init__(self, runtime: Runtime | None) -> None:
        self._runtime = runtime
        self._allocate = _new_memory if runtime is None else runtime.host_memory
        self._pending: deque[_Pending] = deque()
        self._peaks: tuple[torch.Tensor, torch.Tensor] | None = None

    def take(self, values: torch.Tensor, group: OutputGroup, layer: int, *, chosen: ChosenRows | None = None) -> None:
        """Starts to copy the chosen rows of a layer, or all, for a group. Shape: [row_count, row_size], float32."""
        dtype = DTYPES[group.dtype]
        row_count = len(values) if chosen is None else chosen.row_count
        if not row_count:  # Texts without words have no rows.
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
        if chosen is not None:
            peaks = chosen.of(peaks)
        if self._runtime is None:
            if chosen is None:
                host.copy_(values)
            else:
                chosen.write(values, host)
            self._pending.append(_Pending(group, layer, data, peaks, None))
            return
        sent = (values if chosen is None else chosen.of(values)).to(dtype)
        host_peaks = torch.frombuffer(self._runtime.host_memory(peaks.nbytes), dtype=peaks.dtype)
        arrival = self._runtime.to_host([(host, sent), (host_peaks, peaks)])
        self._pending.append(_Pending(group, layer, data, host_peaks, arrival, read=(sent, peaks)))

    def done(self) -> Iterator[Rows]:
        """Yields what has arrived, without waiting."""
        while self._pending and (self._pending[0].arrival is None or self._pending[0].arrival.query()):
            yield from _rows(self._pending.popleft())

    def rest(self) -> Iterator[Rows]:
        """Yields all that is left, waiting for each."""
        while self._pending:
            self._pending[0].wait()
            yield from _rows(self._pending.popleft())

    def wait(self) -> None:
        """Waits until nothing is being written any more; buffers that are let go of may be lent anew at once."""
        for pending in self._pending:
            pending.wait()
        self._pending.clear()

    def _row_peaks(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the largest magnitude of each row, NaN where there is one; once for a layer that several share."""
        if self._peaks is None or self._peaks[0] is not values:
            if self._runtime is None:  # The norm takes 4 to 50 times as long on the CPU, and is one kernel elsewhere.
                peaks = torch.maximum(values.amax(1), values.amin(1).neg_())
            else:
                peaks = torch.linalg.vector_norm(values, ord=float("inf"), dim=1)
            self._peaks = values, peaks
        return self._peaks[1]


def _rows(pending: _Pending) -> Iterator[Rows]:
    """Yields what has arrived, portion by portion."""
    group = pending.group
    bad = ~(pending.peaks.numpy() < NARROW_LIMITS[group.dtype])
    none_bad = not bad.any()
    shared = len(group.members) > 1
    row = 0
    for member in group.members:
        counts = group.output.row_counts(member.run.texts)
        end = row + sum(counts)
        row_bytes = member.run.plan.row_bytes(group.output)
        data = pending.data[row * row_bytes : end * row_bytes]
        if shared:  # Each gets a copy, so that a slow reader does not hold the rows of the others.
            data = _copied(data, member.run.allocate(member.output_index, pending.layer, len(data)))
        yield Rows(
            run_index=member.run_index,
            output_index=member.output_index,
            layer=pending.layer,
            data=data,
            failures={} if none_bad else _failures(pending, slice(row, end), counts),
        )
        row = end


def _copied(data: memoryview, target: memoryview | None) -> memoryview:
    if target is None:
        return memoryview(bytes(data))
    target[:] = data
    return target


def _failures(pending: _Pending, rows: slice, counts: Sequence[int]) -> dict[int, LayertapError]:
    """Returns which texts of a portion cannot be sent, and why."""
    peaks, dtype = pending.peaks.numpy()[rows], pending.group.dtype
    bad = ~(peaks < NARROW_LIMITS[dtype])
    text_of_row = np.repeat(np.arange(len(counts)), counts)
    return {
        text: unsendable(finite=bool(np.isfinite(peaks[text_of_row == text]).all()), layer=pending.layer, dtype=dtype)
        for text in np.unique(text_of_row[bad]).tolist()
    }


def _new_memory(byte_count: int) -> memoryview:
    return np.empty(byte_count, np.uint8).data
