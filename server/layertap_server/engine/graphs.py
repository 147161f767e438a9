"""Small batches as one launch: CUDA graphs, recorded at start for a few numbers of rows.

A short text alone is some two hundred kernels of a few microseconds each, and the host takes longer to queue them than
the device to run them. A graph queues all at once. It runs the same kernels over the same memory each time, so inputs
are copied into fixed tensors, rows behind the batch's own belong to no text, and bounds behind the last text are of
empty texts. Only batches that need the last layer, without attention masks of their own, and with few rows run so.

Recording stops at a bound of time and memory; what is not recorded by then runs launch by launch.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch

from layertap_server.engine.fast_path import Trial, tried
from layertap_server.engine.packing import PackedBatch
from layertap_server.engine.runtime import Arrival, Runtime
from layertap_server.engine.upload import Sent, Upload
from layertap_server.types import Output, OutputKind, Plan, Run, Text

log = logging.getLogger(__name__)

Pass = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], list[torch.Tensor]]
"""Runs the whole model. Ids, token types and positions (shape of each: [row_count], int32) and the bounds of the texts
(shape: [text_count + 1], int32) to all layers. Shape of each: [row_count, hidden_size], float32."""

_ROW_COUNTS: Final = (64, 128, 256, 512, 1024)
_MOST_TEXTS: Final = 64
_MOST_SECONDS: Final = 20.0
_MOST_BYTES: Final = 1 << 30
_WARM_RUNS: Final = 2
_TOLERANCE: Final = 5e-2
"""Of a whole pass in half precision: other row counts take other kernels, and their rounding adds up layer by layer.
Where memory is not ready, or the recorded batch runs again, values are off by themselves."""


class Graph:
    """The model for one number of rows.

    Attributes:
        row_count: The number.
        layers: What the last run gave. Shape of each: [row_count, hidden_size], float32.
        lock: Held from before a run until its layers are copied away.
        ended: The end of the last run.
    """

    def __init__(self, run: Pass, row_count: int, runtime: Runtime) -> None:
        device = runtime.device
        self.row_count = row_count
        self.lock = threading.Lock()
        self._inputs = [torch.zeros(row_count, dtype=torch.int32, device=device) for _ in range(3)]
        self._reached = runtime.reached
        self._bounds = torch.zeros(_MOST_TEXTS + 1, dtype=torch.int32, device=device)
        self.layers: list[torch.Tensor] = []
        self.ended: Arrival | None = None

        def record() -> None:
            ids, types, positions = self._inputs
            self.layers = run(ids, types, positions, self._bounds)

        for _ in range(_WARM_RUNS):  # What libraries set up at their first call must not be recorded.
            record()
        self._replay = runtime.capture(record)

    @property
    def byte_count(self) -> int:
        """The bytes of its layers, which are most of what it holds."""
        return sum(layer.nbytes for layer in self.layers)

    def run(self, inputs: Sequence[torch.Tensor], bounds: torch.Tensor) -> list[torch.Tensor]:
        """Starts a run; returns all layers of a batch. Rows behind it are of earlier batches.

        The layers stay until the next run, before which `ended` must have passed.
        """
        for own, given in zip(self._inputs, inputs, strict=True):
            own[: len(given)].copy_(given)
        self._bounds.copy_(bounds)
        self._replay()
        self.ended = self._reached()
        return self.layers


class GraphInput:
    """A batch that a graph runs, once its upload is sent. It holds the graph until it is closed.

    Attributes:
        packed_batch: The batch.
    """

    def __init__(self, graph: Graph, packed_batch: PackedBatch, inputs: Sequence[Sent], upload: Upload) -> None:
        """Adds the bounds of the texts to the upload, for a graph that was taken for the batch.

        Inputs are ids, token types and positions. Shape of each: [row_count], int32.
        """
        self.packed_batch = packed_batch
        self._graph, self._inputs = graph, inputs
        bounds = packed_batch.bounds
        self._bounds = upload.add(np.pad(bounds, (0, _MOST_TEXTS + 1 - len(bounds)), "edge"))

    def run(self) -> list[torch.Tensor]:
        """Returns all layers, valid until `close`. Shape of each: [row_count of the graph, hidden_size], float32."""
        return self._graph.run([sent.tensor for sent in self._inputs], self._bounds.tensor)

    def close(self) -> None:
        """Frees the graph; its next run writes over the layers, so nothing may read them any more.

        A batch that has failed, or that has no rows to copy, has not waited for its run.
        """
        try:
            if self._graph.ended is not None:
                self._graph.ended.synchronize()
        finally:
            self._graph.lock.release()


class Graphs:
    """The graphs of one model on one device."""

    def __init__(self, run: Pass, *, max_length: int, runtime: Runtime) -> None:
        """Records graphs, smallest first; those that are clearly faster than what they repeat are kept.

        One that is not right ends that: a recording that fails leaves torch's allocator in a worse state.
        The pass must run the same kernels whatever its input. No text has more rows than `max_length`.
        """
        self._graphs: list[Graph] = []
        started, byte_count = time.monotonic(), 0
        for row_count in _ROW_COUNTS:
            if time.monotonic() - started > _MOST_SECONDS or byte_count > _MOST_BYTES:
                log.info("graphs: none for %d rows and more, the bound of time or memory is reached", row_count)
                break
            found = _record(run, row_count, max_length, runtime)
            if not found.is_right:
                break
            if found.better is not None:
                byte_count += found.better.byte_count
                self._graphs.append(found.better)

    def take(self, packed_batch: PackedBatch, layer_count: int) -> Graph | None:
        """Returns the smallest graph that can run a batch, for this batch alone; None: it runs layer by layer."""
        groups, row_count = packed_batch.groups, packed_batch.row_count(0)
        if packed_batch.depth < layer_count or any(group.attention_mask is not None for group in groups):
            return None
        if len(packed_batch.bounds) > _MOST_TEXTS + 1:
            return None
        fitting = next((graph for graph in self._graphs if graph.row_count >= row_count), None)
        return fitting if fitting is not None and fitting.lock.acquire(blocking=False) else None


def _record(run: Pass, row_count: int, max_length: int, runtime: Runtime) -> Trial[Graph | None]:
    """Compares a graph with launching, for a batch other than the recorded one."""
    batch = PackedBatch([_trial(row_count - row_count // 5, max_length)])
    total = batch.row_count(0)
    upload, late = Upload(runtime), Upload(runtime)
    arrays = batch.input_ids, np.zeros(total, np.int32), batch.position_ids(None).astype(np.int32)
    inputs = [upload.add(array) for array in arrays]
    own_bounds = upload.add(batch.bounds)
    upload.send()
    made: list[Graph] = []

    def launched() -> list[torch.Tensor]:
        ids, types, positions = (sent.tensor for sent in inputs)
        return run(ids, types, positions, own_bounds.tensor)

    def replayed() -> Callable[[], list[torch.Tensor]]:
        made.append(Graph(run, row_count, runtime))
        graph_input = GraphInput(made[0], batch, inputs, late)
        late.send()
        return graph_input.run

    found = tried(
        f"graph of {row_count} rows",
        launched,
        replayed,
        lambda way: [layer[:total] for layer in way()],
        runtime=runtime,
        tolerance=_TOLERANCE,
    )
    upload.wait()
    late.wait()
    better = made[0] if found.is_faster else None
    return Trial(better=better, is_right=found.is_right, is_faster=found.is_faster)


def _trial(row_count: int, max_length: int) -> Run:
    """Returns texts of so many rows together: a long one, and short ones."""
    lengths = [min(max_length, row_count // 2)]
    while (left := row_count - sum(lengths)) and len(lengths) < _MOST_TEXTS:
        lengths.append(min(13, left, max_length))
    output = Output(kind=OutputKind.HIDDEN_STATES, layers=(0,), row_size=1)
    # Ids that any vocabulary has: one beyond it would stop the device for good. Positions make the rows differ.
    texts = [Text(np.arange(length, dtype=np.int32) % 2) for length in lengths]
    return Run(plan=Plan(outputs=(output,), dtype="float32"), texts=texts)
