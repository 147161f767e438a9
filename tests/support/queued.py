"""A queue with an engine whose numbers can be computed by hand: a text's vector is its first id, each row its id."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from layertap import (
    InvalidArgumentError,
    LayertapError,
)
from layertap_server.scheduler.batcher import Batcher
from layertap_server.scheduler.call import Call
from layertap_server.scheduler.events import CallFailed, Event, RunDone
from layertap_server.types import Output, OutputKind, Plan, Pool, Rows, Run, Strategy, Text, Unit

WAIT_S = 20.0

VECTOR = Output(kind=OutputKind.POOLED_VECTORS, layers=(1,), row_size=1, pool=Pool(strategy=Strategy.CLS))
LAYER = Output(kind=OutputKind.HIDDEN_STATES, layers=(0, 1), row_size=1)
VECTORS = Plan(outputs=(VECTOR,), dtype="float32")
"""4 bytes a text."""
LAYERS = Plan(outputs=(LAYER,), dtype="float32")
"""8 bytes a token."""


def text(first: int, length: int = 1) -> Text:
    return Text(np.arange(first, first + length, dtype=np.int32))


def wanted(output: Output, one: Text, layer: int) -> list[float]:
    ids = one.input_ids if output.unit is Unit.TOKEN else one.input_ids[:1]
    return [float(number + 1000 * layer) for number in ids]


class Engine:
    """An `encode` that says what it was given, and waits for leave before it computes."""

    def __init__(self, *, gated: bool = True) -> None:
        self.batches: queue.Queue[Sequence[Run]] = queue.Queue()
        self._leave = threading.Semaphore(0)
        self._gated = gated
        self.failing: set[int] = set()
        """First ids of texts at which a batch breaks."""
        self.unsendable: set[int] = set()
        """First ids of texts whose numbers cannot be sent."""

    def __call__(self, runs: Sequence[Run]) -> Iterator[Rows]:
        self.batches.put(runs)
        if self._gated:
            assert self._leave.acquire(timeout=WAIT_S)
        for layer in (0, 1):
            for run_index, run in enumerate(runs):
                for output_index, output in enumerate(run.plan.outputs):
                    if layer in output.layers:
                        yield self._rows(run_index, run, output_index, layer)

    def _rows(self, run_index: int, run: Run, output_index: int, layer: int) -> Rows:
        firsts = [int(one.input_ids[0]) for one in run.texts]
        if self.failing.intersection(firsts):
            raise RuntimeError("the engine broke")
        values = [value for one in run.texts for value in wanted(run.plan.outputs[output_index], one, layer)]
        return Rows(
            run_index=run_index,
            output_index=output_index,
            layer=layer,
            data=memoryview(np.array(values, "<f4").tobytes()),
            failures={n: InvalidArgumentError("unsendable") for n, one in enumerate(firsts) if one in self.unsendable},
        )

    def next_batch(self) -> list[list[int]]:
        """Waits for a batch to start; returns the first ids of each run."""
        return [[int(one.input_ids[0]) for one in run.texts] for run in self.batches.get(timeout=WAIT_S)]

    def let_go(self, count: int = 1) -> None:
        self._leave.release(count)


class Caller:
    """One call, and the events it has had. With `reads` it gives the bytes of each run back at once."""

    def __init__(
        self, batcher: Batcher, plan: Plan = VECTORS, *, client: str = "a", reads: bool = False, **options: Any
    ) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self._reads = reads
        self.call: Call = batcher.open(plan, client=client, deliver=self._deliver, **options)

    def _deliver(self, event: Event) -> None:
        self.events.put(event)
        if self._reads and isinstance(event, RunDone):
            self.call.release(event.reserved_bytes, run_done=True)

    def add(self, *firsts: int, length: int = 1) -> Caller:
        self.call.add([text(first, length) for first in firsts])
        return self

    def next(self, kind: type[Any] = RunDone) -> Any:
        """Waits for the next event of a kind."""
        while True:
            event = self.events.get(timeout=WAIT_S)
            if isinstance(event, kind):
                return event
            assert not isinstance(event, CallFailed), event

    def failure(self) -> LayertapError:
        return self.next(CallFailed).error

    def close(self) -> None:
        self.call.close()


Make = Callable[..., Batcher]
"""Makes batchers with generous limits."""


def plugged(batcher: Batcher, engine: Engine) -> Caller:
    """Keeps the instance busy, so that what comes after waits in the queue."""
    plug = Caller(batcher, client="plug").add(999)
    assert engine.next_batch() == [[999]]
    return plug
