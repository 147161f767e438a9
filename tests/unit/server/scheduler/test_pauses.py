"""A long batch pauses for short calls: with an engine whose steps the test allows one by one."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from layertap import DeadlineExceededError, InternalError, LayertapError, UnavailableError
from layertap_server.scheduler.batcher import Batcher
from layertap_server.scheduler.call import BatchPart, Hooks
from layertap_server.scheduler.events import CallFailed, Event, RowsReady, RunDone
from layertap_server.scheduler.queue_limits import QueueLimits
from layertap_server.types import (
    DeviceLostError,
    Mix,
    Mixing,
    Output,
    OutputKind,
    Plan,
    Pool,
    Rows,
    Run,
    Strategy,
    Text,
)

WAIT_S = 20.0
STEPS = 3
LONG, SHORT, OTHER = 1, 2, 3
"""First ids of texts."""
LONG_LENGTH, SHORT_LENGTH = 40, 10
POOL = Pool(strategy=Strategy.CLS)
VECTOR = Plan(outputs=(Output(kind=OutputKind.POOLED_VECTORS, layers=(1,), row_size=1, pool=POOL),), dtype="float32")


class Engine:
    """Computes each batch in steps, with a pause after each. The value of a text is its first id."""

    def __init__(self) -> None:
        self.begun: queue.Queue[tuple[int, int]] = queue.Queue()
        """The first id of the batch, and the number of the step."""
        self.errors: dict[int, BaseException] = {}
        """By the first id of a batch: what its second step raises."""
        self.closed: queue.Queue[int] = queue.Queue()
        self._allowed = {first: threading.Semaphore(0) for first in (LONG, SHORT, OTHER)}

    def __call__(self, batch: Sequence[Run]) -> Iterator[Rows | None]:
        first = int(batch[0].texts[0].input_ids[0])
        try:
            for step in range(STEPS):
                self.begun.put((first, step))
                assert self._allowed[first].acquire(timeout=WAIT_S)
                if step and first in self.errors:
                    raise self.errors[first]
                yield None
            for index, run in enumerate(batch):
                values = np.array([text.input_ids[0] for text in run.texts], "<f4")
                data = memoryview(values.tobytes())
                yield Rows(run_index=index, output_index=0, layer=1, data=data, failures={})
        finally:
            self.closed.put(first)

    def allow(self, first: int, count: int = 1) -> None:
        self._allowed[first].release(count)

    def next_step(self) -> tuple[int, int]:
        return self.begun.get(timeout=WAIT_S)


class Ran(Hooks):
    def __init__(self) -> None:
        self.times_ns: dict[int, int] = {}

    def ran(self, batch: Sequence[BatchPart], *, started_at_ns: int, compute_time_ns: int) -> None:
        self.times_ns[int(batch[0].texts[0].input_ids[0])] = compute_time_ns


class Caller:
    def __init__(self, batcher: Batcher, *firsts: int, length: int, plan: Plan = VECTOR, **options: float) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.call = batcher.open(plan, client=f"client of {firsts}", deliver=self.events.put, **options)  # type: ignore[arg-type]
        self.add(*firsts, length=length)

    def add(self, *firsts: int, length: int) -> None:
        self.call.add([Text(np.array([first, *[0] * (length - 1)], np.int32)) for first in firsts])

    def values(self) -> list[float]:
        """Waits for the end of a run; returns its values."""
        ready = self.events.get(timeout=WAIT_S)
        assert isinstance(ready, RowsReady), ready
        done = self.events.get(timeout=WAIT_S)
        assert isinstance(done, RunDone)
        self.call.release(done.reserved_bytes, run_done=True)
        return np.frombuffer(ready.rows.data, "<f4").tolist()

    def error(self) -> LayertapError:
        failed = self.events.get(timeout=WAIT_S)
        assert isinstance(failed, CallFailed), failed
        self.call.close()
        return failed.error


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def hooks() -> Ran:
    return Ran()


@pytest.fixture
def batcher(engine: Engine, hooks: Ran) -> Iterator[Batcher]:
    made = Batcher(
        [engine],
        QueueLimits(
            max_batch_tokens=50,
            max_batch_bytes=1000,
            min_share_tokens=1,
            max_queue_texts=100,
            max_queue_tokens=1000,
            max_output_bytes=1000,
            max_call_output_bytes=1000,
        ),
        hooks=hooks,
    )
    yield made
    for first in (LONG, SHORT, OTHER):
        engine.allow(first, 100)
    made.stop(WAIT_S)


@pytest.fixture
def long(batcher: Batcher, engine: Engine) -> Caller:
    """A call whose batch is in its first step."""
    caller = Caller(batcher, LONG, length=LONG_LENGTH)
    assert engine.next_step() == (LONG, 0)
    return caller


def test_a_short_call_is_answered_before_the_long_batch_goes_on(batcher: Batcher, engine: Engine, long: Caller) -> None:
    short = Caller(batcher, SHORT, length=SHORT_LENGTH)
    engine.allow(LONG)
    engine.allow(SHORT, STEPS)
    assert short.values() == [SHORT]
    assert [engine.next_step() for _ in range(STEPS + 1)] == [*((SHORT, n) for n in range(STEPS)), (LONG, 1)]
    assert long.events.empty()
    engine.allow(LONG, STEPS)
    assert long.values() == [LONG]
    assert batcher.held_bytes == 0 and batcher.waiting_token_count == 0


def test_short_calls_share_a_pause_and_need_not_come_first(batcher: Batcher, engine: Engine, long: Caller) -> None:
    too_long = Caller(batcher, OTHER, length=SHORT_LENGTH + 1)
    shorts = [Caller(batcher, SHORT, length=SHORT_LENGTH // 2) for _ in range(2)]
    engine.allow(LONG)
    engine.allow(SHORT, STEPS)
    assert [short.values() for short in shorts] == [[SHORT], [SHORT]]
    assert [engine.next_step() for _ in range(STEPS + 1)] == [*((SHORT, n) for n in range(STEPS)), (LONG, 1)]
    engine.allow(LONG, STEPS)
    engine.allow(OTHER, STEPS)
    assert long.values() == [LONG] and too_long.values() == [OTHER]


Waits = Callable[[Batcher, Caller], object]


def _more_than_a_quarter(batcher: Batcher, _: Caller) -> Caller:
    return Caller(batcher, SHORT, SHORT, length=SHORT_LENGTH // 2 + 1)


def _a_text_of_the_same_call(_: Batcher, long: Caller) -> None:
    long.add(SHORT, length=1)


def _more_bytes_than_a_quarter(batcher: Batcher, _: Caller) -> Caller:
    output = Output(kind=OutputKind.HIDDEN_STATES, layers=(1,), row_size=100)
    return Caller(batcher, SHORT, length=1, plan=Plan(outputs=(output,), dtype="float32"))


def _mixed(row_size: int) -> Plan:
    mix = Mix(mixing=Mixing.CONCAT, layers=(0, 1), row_size=row_size)
    output = Output(kind=OutputKind.POOLED_VECTORS, layers=(1,), row_size=1, mix=mix, pool=POOL)
    return Plan(outputs=(output,), dtype="float32")


def _mixes_without_room(batcher: Batcher, _: Caller) -> Caller:
    return Caller(batcher, SHORT, length=1, plan=_mixed(251))


@pytest.mark.parametrize(
    "wait", [_more_than_a_quarter, _a_text_of_the_same_call, _more_bytes_than_a_quarter, _mixes_without_room]
)
def test_what_is_not_short_waits(batcher: Batcher, engine: Engine, long: Caller, wait: Waits) -> None:
    wait(batcher, long)
    engine.allow(LONG, STEPS)
    assert [engine.next_step() for _ in range(STEPS)] == [(LONG, 1), (LONG, 2), (SHORT, 0)]


def test_mixes_of_short_calls_have_what_the_batch_leaves_of_their_bytes(batcher: Batcher, engine: Engine) -> None:
    long = Caller(batcher, LONG, length=LONG_LENGTH, plan=_mixed(5))
    assert engine.next_step() == (LONG, 0)
    short = Caller(batcher, SHORT, length=1, plan=_mixed(50))  # Of 1000 bytes the batch takes 800, this one 200.
    other = Caller(batcher, OTHER, length=1, plan=_mixed(1))
    for first in (LONG, SHORT, OTHER):
        engine.allow(first, STEPS)
    assert [one.values() for one in (short, other, long)] == [[SHORT], [OTHER], [LONG]]
    batches = [first for first, step in (engine.next_step() for _ in range(3 * STEPS - 1)) if step == 0]
    assert batches == [SHORT, OTHER], "the second has room only after the first"


def test_a_batch_of_short_texts_does_not_pause(batcher: Batcher, engine: Engine) -> None:
    """It would run texts by the few, of callers whose next batch takes all of them at once."""
    many = Caller(batcher, *[LONG] * 4, length=SHORT_LENGTH)
    assert engine.next_step() == (LONG, 0)
    short = Caller(batcher, SHORT, length=SHORT_LENGTH)
    engine.allow(LONG, STEPS)
    engine.allow(SHORT, STEPS)
    assert [engine.next_step() for _ in range(STEPS)] == [(LONG, 1), (LONG, 2), (SHORT, 0)]
    assert many.values() == [LONG] * 4 and short.values() == [SHORT]


def test_a_batch_in_a_pause_does_not_pause(batcher: Batcher, engine: Engine, long: Caller) -> None:
    short = Caller(batcher, SHORT, length=SHORT_LENGTH)
    engine.allow(LONG)
    assert engine.next_step() == (SHORT, 0)
    Caller(batcher, OTHER, length=1)
    engine.allow(SHORT, STEPS)
    assert short.values() == [SHORT]
    assert [engine.next_step() for _ in range(2)] == [(SHORT, 1), (SHORT, 2)]
    assert engine.next_step() in [(OTHER, 0), (LONG, 1)]


def test_pauses_take_no_longer_than_the_batch_has_run(batcher: Batcher, engine: Engine) -> None:
    started = time.monotonic()
    long = Caller(batcher, LONG, length=LONG_LENGTH)
    assert engine.next_step() == (LONG, 0)
    short = Caller(batcher, SHORT, length=SHORT_LENGTH)
    engine.allow(LONG)
    assert engine.next_step() == (SHORT, 0)
    others = [Caller(batcher, OTHER, length=SHORT_LENGTH) for _ in range(3)]
    time.sleep(time.monotonic() - started)  # The short call computes for longer than the long one has.
    engine.allow(SHORT, STEPS)
    engine.allow(OTHER, 3 * STEPS)
    assert short.values() == [SHORT]
    assert [engine.next_step() for _ in range(STEPS)] == [(SHORT, 1), (SHORT, 2), (LONG, 1)]
    engine.allow(LONG, STEPS)
    assert long.values() == [LONG] and [other.values() for other in others] == [[OTHER]] * 3


def test_the_time_of_a_batch_leaves_its_pauses_out(batcher: Batcher, engine: Engine, hooks: Ran) -> None:
    started_ns = time.monotonic_ns()
    long = Caller(batcher, LONG, length=LONG_LENGTH)
    assert engine.next_step() == (LONG, 0)
    short = Caller(batcher, SHORT, length=SHORT_LENGTH)
    engine.allow(LONG)
    assert engine.next_step() == (SHORT, 0)
    time.sleep(0.1)  # So long the short call computes.
    engine.allow(SHORT, STEPS)
    assert short.values() == [SHORT]
    engine.allow(LONG, STEPS)
    assert long.values() == [LONG]
    batcher.stop(WAIT_S)
    assert hooks.times_ns[SHORT] >= 100e6
    assert hooks.times_ns[LONG] + hooks.times_ns[SHORT] <= time.monotonic_ns() - started_ns


def test_an_error_in_a_pause_fails_the_short_call_alone(
    batcher: Batcher, engine: Engine, long: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    engine.errors[SHORT] = RuntimeError("the engine broke")
    short = Caller(batcher, SHORT, length=SHORT_LENGTH)
    engine.allow(SHORT, STEPS)
    engine.allow(LONG, STEPS)
    assert isinstance(short.error(), InternalError)
    assert long.values() == [LONG]
    assert batcher.held_bytes == 0 and "a batch of 1 text failed" in caplog.text


@pytest.mark.parametrize("error", [DeviceLostError(), SystemExit()])
def test_an_instance_lost_in_a_pause_fails_both(
    batcher: Batcher, engine: Engine, long: Caller, error: BaseException
) -> None:
    engine.errors[SHORT] = error
    short = Caller(batcher, SHORT, length=SHORT_LENGTH)
    engine.allow(SHORT, STEPS)
    engine.allow(LONG)
    assert isinstance(short.error(), UnavailableError) and isinstance(long.error(), UnavailableError)
    assert batcher.live_instance_count == 0 and batcher.held_bytes == 0


def test_an_instance_that_hangs_in_a_pause_is_given_up(batcher: Batcher, engine: Engine, long: Caller) -> None:
    short = Caller(batcher, SHORT, length=SHORT_LENGTH)
    engine.allow(LONG)
    assert engine.next_step() == (SHORT, 0)
    batcher.lose_stuck(timeout_s=1000)
    assert batcher.live_instance_count == 1
    batcher.lose_stuck(timeout_s=0)
    assert isinstance(short.error(), UnavailableError) and isinstance(long.error(), UnavailableError)
    engine.allow(SHORT, STEPS)
    engine.allow(LONG, STEPS)
    assert batcher.workers[0].ended(WAIT_S)
    assert short.events.empty() and long.events.empty() and batcher.held_bytes == 0


def test_a_batch_without_callers_ends_at_its_next_pause(batcher: Batcher, engine: Engine, long: Caller) -> None:
    long.call.close()
    engine.allow(LONG)
    assert engine.closed.get(timeout=WAIT_S) == LONG
    assert engine.begun.empty()


def test_a_short_call_that_leaves_in_a_pause_does_not_end_the_long_batch(
    batcher: Batcher, engine: Engine, long: Caller
) -> None:
    short = Caller(batcher, SHORT, length=SHORT_LENGTH)
    engine.allow(LONG)
    assert engine.next_step() == (SHORT, 0)
    short.call.close()
    engine.allow(SHORT)
    assert engine.closed.get(timeout=WAIT_S) == SHORT
    engine.allow(LONG, STEPS)
    assert long.values() == [LONG] and short.events.empty()


def test_a_short_call_past_its_deadline_is_not_run(batcher: Batcher, engine: Engine, long: Caller) -> None:
    short = Caller(batcher, SHORT, length=SHORT_LENGTH, expires_at=time.monotonic())
    engine.allow(LONG, STEPS)
    assert [engine.next_step() for _ in range(2)] == [(LONG, 1), (LONG, 2)]
    assert long.values() == [LONG] and isinstance(short.error(), DeadlineExceededError)
    assert engine.begun.empty()
