"""Instances that die or hang: their callers get an error, the others go on, the last one fails the queue."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from support import poll

from layertap import InternalError, UnavailableError
from layertap_server.app.lifecycle import until_lost
from layertap_server.scheduler.batcher import Batcher
from layertap_server.scheduler.events import CallFailed, Event, RowsReady, RunDone
from layertap_server.scheduler.queue_limits import QueueLimits
from layertap_server.types import DeviceLostError, Output, OutputKind, Plan, Pool, Rows, Run, Strategy, Text

WAIT_S = 20.0
VECTOR = Output(kind=OutputKind.POOLED_VECTORS, layers=(0, 1), row_size=1, pool=Pool(strategy=Strategy.CLS))
PLAN = Plan(outputs=(VECTOR,), dtype="float32")

BROKEN, LOST, DEAD, STUCK = 1, 2, 3, 4
"""First ids at which a batch breaks, the device is lost, the thread dies, the thread hangs. 0 is a good one."""


class Engine:
    """An `encode` that does what the first id of the first text says, after the first of two layers."""

    def __init__(self) -> None:
        self.running = threading.Event()
        self.leave = threading.Event()
        self.batch_count = 0

    def __call__(self, batch: Sequence[Run]) -> Iterator[Rows]:
        self.batch_count += 1
        kind = int(batch[0].texts[0].input_ids[0])
        for layer in (0, 1):
            if layer:
                self._act(kind)
            for run_index, run in enumerate(batch):
                data = memoryview(bytes(4 * len(run.texts)))
                yield Rows(run_index=run_index, output_index=0, layer=layer, data=data, failures={})

    def _act(self, kind: int) -> None:
        if kind == BROKEN:
            raise RuntimeError("the engine broke")
        if kind == LOST:
            raise DeviceLostError
        if kind == DEAD:
            raise SystemExit
        if kind == STUCK:
            self.running.set()
            assert self.leave.wait(WAIT_S)


class Caller:
    def __init__(self, batcher: Batcher, kind: int) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.call = batcher.open(PLAN, client=f"{id(self)}", deliver=self.events.put)
        self.call.add([Text(np.array([kind], np.int32))])

    def outcome(self) -> RunDone | CallFailed:
        while isinstance(event := self.events.get(timeout=WAIT_S), RowsReady):
            pass
        self.call.close()
        return event

    def error(self) -> Exception:
        outcome = self.outcome()
        assert isinstance(outcome, CallFailed)
        return outcome.error


Make = Callable[..., Batcher]


@pytest.fixture
def engines() -> list[Engine]:
    return [Engine(), Engine()]


@pytest.fixture
def batcher(engines: list[Engine]) -> Iterator[Batcher]:
    made = Batcher(
        engines,
        QueueLimits(
            max_batch_tokens=1,
            max_batch_bytes=100,
            min_share_tokens=1,
            max_queue_texts=100,
            max_queue_tokens=100,
            max_output_bytes=1000,
            max_call_output_bytes=100,
        ),
    )
    yield made
    for engine in engines:
        engine.leave.set()
    made.stop(WAIT_S)


def test_a_broken_batch_is_not_the_end_of_its_instance(batcher: Batcher, engines: list[Engine]) -> None:
    for _ in range(5):
        assert isinstance(Caller(batcher, BROKEN).error(), InternalError)
    assert batcher.live_instance_count == 2
    assert isinstance(Caller(batcher, 0).outcome(), RunDone)


@pytest.mark.parametrize("kind", [LOST, DEAD])
def test_a_dead_instance_takes_its_callers_and_the_last_one_all(
    batcher: Batcher, engines: list[Engine], kind: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert isinstance(Caller(batcher, kind).error(), UnavailableError)
    for _ in range(5):
        assert isinstance(Caller(batcher, 0).outcome(), RunDone), "the other instance goes on"
    assert batcher.live_instance_count == 1
    error = Caller(batcher, kind).error()
    assert isinstance(error, UnavailableError) and error.retry_after_s
    with pytest.raises(UnavailableError, match="engine has failed"):
        Caller(batcher, 0)
    assert batcher.live_instance_count == 0 and batcher.held_bytes == 0
    assert batcher.stop(WAIT_S), "dead threads have ended"
    assert caplog.text.count("is lost\n") == 2


def test_a_stuck_instance_is_given_up_and_ends_when_it_comes_back(batcher: Batcher, engines: list[Engine]) -> None:
    callers = [Caller(batcher, STUCK), Caller(batcher, STUCK)]
    assert all(engine.running.wait(WAIT_S) for engine in engines)
    waiting = Caller(batcher, 0)
    stream = waiting.call
    batcher.lose_stuck(timeout_s=1000)
    assert batcher.live_instance_count == 2, "slow is not stuck"
    batcher.lose_stuck(timeout_s=0)
    assert batcher.live_instance_count == 0
    for caller in (*callers, waiting):
        assert isinstance(caller.error(), UnavailableError)
    with pytest.raises(UnavailableError):
        stream.add([Text(np.zeros(1, np.int32))], waits=True)
    assert not batcher.stop(0.01), "a thread that hangs cannot be waited for"
    for engine in engines:
        engine.leave.set()
    assert all(instance.ended(WAIT_S) for instance in batcher.workers)
    assert [engine.batch_count for engine in engines] == [1, 1]
    assert all(caller.events.empty() for caller in callers), "who was told of a failure gets no results after it"
    assert batcher.held_bytes == 0


def test_a_instance_without_work_is_not_stuck(batcher: Batcher) -> None:
    assert isinstance(Caller(batcher, 0).outcome(), RunDone)
    assert isinstance(Caller(batcher, 0).outcome(), RunDone)
    batcher.lose_stuck(timeout_s=1000)
    assert batcher.live_instance_count == 2


def test_an_instance_is_not_given_up_for_the_time_that_the_whole_process_was_stopped(
    batcher: Batcher, engines: list[Engine]
) -> None:
    async def stopped_for(seconds: float) -> None:
        watch = asyncio.create_task(until_lost(batcher, timeout_s=2.0))
        await asyncio.sleep(0)
        time.sleep(seconds)  # As in a paused container, the loop does not run either.
        await asyncio.sleep(0.6)
        watch.cancel()

    caller = Caller(batcher, STUCK)
    poll(lambda: any(engine.running.is_set() for engine in engines))
    asyncio.run(stopped_for(2.5))
    assert batcher.live_instance_count == 2
    for engine in engines:
        engine.leave.set()
    assert isinstance(caller.outcome(), RunDone)
