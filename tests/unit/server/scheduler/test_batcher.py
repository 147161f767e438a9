"""The queue, with an engine whose numbers can be computed by hand: a text's vector is its first id, each row its id."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import poll

from layertap import (
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    LayertapError,
    ResourceExhaustedError,
    UnavailableError,
)
from layertap_server.scheduler.batcher import Batcher
from layertap_server.scheduler.call import Call
from layertap_server.scheduler.events import CallFailed, Event, QueueRoom, RowsReady, RunDone
from layertap_server.scheduler.queue_limits import QueueLimits
from layertap_server.types import Mix, Mixing, Output, OutputKind, Plan, Pool, Rows, Run, Strategy, Text, Unit

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


@pytest.fixture
def engine() -> Engine:
    return Engine()


Make = Callable[..., Batcher]


@pytest.fixture
def make(engine: Engine) -> Iterator[Make]:
    """Makes batchers with generous limits, and stops them."""
    made: list[Batcher] = []

    def one(*engines: Engine, **limits: int) -> Batcher:
        generous = {
            "max_batch_tokens": 100,
            "max_batch_bytes": 10_000,
            "min_share_tokens": 1,
            "max_queue_texts": 1000,
            "max_queue_tokens": 10_000,
            "max_output_bytes": 100_000,
            "max_call_output_bytes": 50_000,
        }
        made.append(Batcher(engines or (engine,), QueueLimits(**generous | limits)))
        return made[-1]

    yield one
    engine.let_go(1000)
    for batcher in made:
        batcher.stop(WAIT_S)


def plugged(batcher: Batcher, engine: Engine) -> Caller:
    """Keeps the instance busy, so that what comes after waits in the queue."""
    plug = Caller(batcher, client="plug").add(999)
    assert engine.next_batch() == [[999]]
    return plug


def test_a_text_comes_back_as_its_numbers_layer_by_layer(make: Make, engine: Engine) -> None:
    batcher = make()
    assert batcher.instance_count == 1
    started = time.monotonic_ns()
    caller = Caller(batcher, Plan(outputs=(LAYER, VECTOR), dtype="float32"))
    caller.call.add([text(5, 3), text(9, 1)])
    assert engine.next_batch() == [[5, 9]]
    engine.let_go()
    found = [caller.next(RowsReady) for _ in range(3)]
    assert [(part.rows.output_index, part.rows.layer) for part in found] == [(0, 0), (0, 1), (1, 1)]
    assert [np.frombuffer(part.rows.data, "<f4").tolist() for part in found] == [
        [5, 6, 7, 9],
        [1005, 1006, 1007, 1009],
        [1005, 1009],
    ]
    assert all(part.first_text == 0 and len(part.texts) == 2 for part in found)
    done = caller.next()
    assert done.first_text == 0 and len(done.texts) == 2
    assert done.reserved_bytes == 2 * 4 * 4 + 2 * 4
    assert done.queue_time_ns >= 0 and done.compute_time_ns > 0
    assert done.queue_time_ns + done.compute_time_ns <= time.monotonic_ns() - started


def test_what_waits_longer_has_a_longer_queue_time(make: Make, engine: Engine) -> None:
    batcher = make(max_batch_tokens=1)
    plug = plugged(batcher, engine)
    caller = Caller(batcher).add(1)
    added_at = time.monotonic_ns()
    Caller(batcher).add(2)
    resumed_at = time.monotonic_ns()
    engine.let_go(2)
    plug_done, done = plug.next(), caller.next()
    assert done.queue_time_ns >= resumed_at - added_at
    assert plug_done.compute_time_ns >= resumed_at - added_at


def test_one_client_is_served_in_the_order_of_arrival(make: Make, engine: Engine) -> None:
    batcher = make(max_batch_tokens=4)
    plugged(batcher, engine)
    first = Caller(batcher).add(1, 2, 3)
    second = Caller(batcher).add(4, 5)
    first.add(6)
    engine.let_go(10)
    assert engine.next_batch() == [[1, 2, 3], [4]]
    assert engine.next_batch() == [[5], [6]]
    assert first.next().first_text == 0
    assert second.next().first_text == 0


def test_a_stream_with_texts_always_waiting_holds_up_no_call_of_its_connection(make: Make, engine: Engine) -> None:
    batcher = make(max_batch_tokens=2)
    stream, call = Caller(batcher, reads=True), Caller(batcher, reads=True)
    stream.add(1)
    assert engine.next_batch() == [[1]]  # The only instance is busy now; the rest waits.
    stream.add(2, 3, 4)
    call.add(50, 51)
    stream.add(5, 6)
    call.add(52)
    found = []
    for _ in range(4):
        engine.let_go()
        found.append(engine.next_batch())
    engine.let_go()
    assert found == [[[2, 3]], [[4], [50]], [[51], [5]], [[6], [52]]]


@pytest.mark.parametrize("place", [{"client": "short"}, {"connection": "short"}], ids=["client", "connection"])
def test_a_short_call_waits_for_no_more_than_the_batch_that_runs(
    make: Make, engine: Engine, place: dict[str, str]
) -> None:
    batcher = make(max_batch_tokens=4)
    Caller(batcher, reads=True).add(*range(10, 30))
    assert engine.next_batch() == [[10, 11, 12, 13]]
    for first in (1, 2):  # However often it comes, what has more to do has its share in between.
        short = Caller(batcher, **place).add(first, length=3)
        engine.let_go()
        assert engine.next_batch()[0] == [first]
        engine.let_go()
        assert short.next()
        assert engine.next_batch()[0][0] >= 14


def test_texts_of_a_call_are_numbered_on_through_its_batches(make: Make, engine: Engine) -> None:
    batcher = make(max_batch_tokens=2)
    plugged(batcher, engine)
    caller = Caller(batcher, reads=True).add(1, 2, 3).add(4, 5)
    engine.let_go(10)
    assert [engine.next_batch() for _ in range(3)] == [[[1, 2]], [[3, 4]], [[5]]]
    assert [(done.first_text, len(done.texts)) for done in (caller.next(), caller.next(), caller.next())] == [
        (0, 2),
        (2, 2),
        (4, 1),
    ]


def test_clients_are_served_round_robin(make: Make, engine: Engine) -> None:
    batcher = make(max_batch_tokens=4)
    plugged(batcher, engine)
    Caller(batcher, client="bulk", reads=True).add(*range(10, 20))
    Caller(batcher, client="small").add(1)
    Caller(batcher, client="other").add(2, 3)
    engine.let_go(10)
    assert sorted(engine.next_batch()) == [[1], [2], [10, 11]]
    assert sorted(engine.next_batch()) == [[3], [12, 13, 14]]
    assert engine.next_batch() == [[15, 16, 17, 18]]


def test_many_calls_of_one_client_count_as_one(make: Make, engine: Engine) -> None:
    batcher = make(max_batch_tokens=4)
    plugged(batcher, engine)
    for n in range(10, 18, 2):
        Caller(batcher, client="greedy").add(n, n + 1)
    Caller(batcher, client="modest").add(1, 2)
    engine.let_go(10)
    assert sorted(engine.next_batch()) == [[1, 2], [10, 11]]


def test_a_client_gets_no_more_for_opening_many_connections(make: Make, engine: Engine) -> None:
    batcher = make(max_batch_tokens=4)
    plugged(batcher, engine)
    for n in range(10, 18):
        Caller(batcher, client="flood", connection=str(n), reads=True).add(n)
    Caller(batcher, client="polite", reads=True).add(1, 2, 3, 4)
    engine.let_go(10)
    assert sorted(engine.next_batch()) == [[1, 2], [10], [11]]
    assert sorted(engine.next_batch()) == [[3, 4], [12], [13]]
    assert sorted(engine.next_batch()) == [[14], [15], [16], [17]]


def test_connections_of_one_client_are_served_round_robin_and_keep_their_order(make: Make, engine: Engine) -> None:
    batcher = make(max_batch_tokens=4)
    plugged(batcher, engine)
    Caller(batcher, connection="flood", reads=True).add(*range(10, 20))
    Caller(batcher, connection="flood", reads=True).add(*range(20, 30))
    Caller(batcher, connection="polite", reads=True).add(1, 2, 3)
    engine.let_go(10)
    assert sorted(engine.next_batch()) == [[1, 2], [10, 11]]
    assert sorted(engine.next_batch()) == [[3], [12, 13, 14]]
    assert engine.next_batch() == [[15, 16, 17, 18]]
    assert sorted(engine.next_batch()) == [[19], [20, 21, 22]]


def test_a_batch_keeps_to_its_tokens(make: Make, engine: Engine) -> None:
    batcher = make(max_batch_tokens=10)
    plugged(batcher, engine)
    Caller(batcher).add(100, 200, 300, length=4).add(1, 2, 3)
    engine.let_go(10)
    assert engine.next_batch() == [[100, 200]]
    assert engine.next_batch() == [[300, 1, 2, 3]]


def test_a_batch_keeps_to_its_output_bytes(make: Make, engine: Engine) -> None:
    batcher = make(max_batch_bytes=32)
    plugged(batcher, engine)
    Caller(batcher, LAYERS).add(100, 200, 300, length=2)
    Caller(batcher, LAYERS, client="large").add(400, length=50)
    engine.let_go(10)
    batches = [engine.next_batch() for _ in range(3)]
    assert [[400]] in batches, "what exceeds the budget runs alone"
    assert sorted(n for batch in batches for run in batch for n in run) == [100, 200, 300, 400]
    assert all(sum(map(len, batch)) <= 2 for batch in batches)


def test_a_text_above_the_budget_is_a_batch_of_its_own(make: Make, engine: Engine) -> None:
    batcher = make(max_batch_tokens=4)
    plugged(batcher, engine)
    Caller(batcher, reads=True).add(1, 2).add(100, length=9).add(3)
    engine.let_go(10)
    assert [engine.next_batch() for _ in range(3)] == [[[1, 2]], [[100]], [[3]]]


def test_while_other_instances_idle_a_instance_takes_its_share_and_alone_it_takes_all(make: Make) -> None:
    engines = [Engine(), Engine()]
    batcher = make(*engines, min_share_tokens=3)
    try:
        poll(lambda: batcher.idle_instance_count == 2)
        Caller(batcher).add(*range(8))
        sizes = sorted(sum(map(len, one.next_batch())) for one in engines)
        assert sizes == [4, 4]
        Caller(batcher).add(*range(20, 30))
        engines[0].let_go()
        assert sum(map(len, engines[0].next_batch())) == 10
        engines[0].let_go()
        engines[1].let_go()
        poll(lambda: batcher.idle_instance_count == 2)
        Caller(batcher).add(*range(40, 44))
        took: queue.Queue[int] = queue.Queue()
        for one in engines:
            threading.Thread(target=lambda one=one: took.put(sum(map(len, one.next_batch())))).start()
        assert sorted(took.get(timeout=WAIT_S) for _ in range(2)) == [1, 3], "less than min_share_tokens is not split"
    finally:
        for one in engines:
            one.let_go(100)


def test_a_full_queue_refuses_at_once_and_takes_nothing(make: Make, engine: Engine) -> None:
    batcher = make(max_queue_texts=3)
    plugged(batcher, engine)
    patient = Caller(batcher).add(1, 2)
    refused = Caller(batcher, client="b")
    with pytest.raises(ResourceExhaustedError, match="texts") as caught:
        refused.add(3, 4)
    assert caught.value.retry_after_s is not None and caught.value.retry_after_s > 0
    assert batcher.waiting_text_count == 2
    refused.add(5)
    with pytest.raises(ResourceExhaustedError):
        refused.add(6)
    engine.let_go(10)
    assert sorted(engine.next_batch()) == [[1, 2], [5]]
    patient.next()
    refused.next()
    poll(lambda: batcher.waiting_text_count == 0)
    refused.add(7)
    assert engine.next_batch() == [[7]]


def test_the_queue_is_bounded_in_tokens_too_but_takes_any_one_request_when_empty(make: Make, engine: Engine) -> None:
    batcher = make(max_queue_tokens=10)
    plugged(batcher, engine)
    Caller(batcher).add(100, length=25)
    with pytest.raises(ResourceExhaustedError, match="tokens") as caught:
        Caller(batcher).add(1)
    assert caught.value.retry_after_s is not None and caught.value.retry_after_s > 0
    assert batcher.waiting_text_count == 1


def test_the_last_quarter_of_the_queue_is_kept_for_clients_who_have_little_in_it(make: Make, engine: Engine) -> None:
    batcher = make(max_queue_texts=8)
    plugged(batcher, engine)
    Caller(batcher, client="flood").add(1, 2, 3, 4, 5, 6)
    for refused in range(2):
        with pytest.raises(ResourceExhaustedError):
            Caller(batcher, client="flood").add(refused)
    Caller(batcher, client="polite").add(8).add(9)
    with pytest.raises(ResourceExhaustedError):
        Caller(batcher, client="late").add(10)


def test_a_call_that_waits_for_room_in_the_queue_learns_when_to_try_again(make: Make, engine: Engine) -> None:
    batcher = make(max_queue_texts=1)
    plugged(batcher, engine)
    stream = Caller(batcher).add(1)
    assert not stream.call.add([text(2)], waits=True)
    assert batcher.waiting_text_count == 1
    engine.let_go(10)
    assert engine.next_batch() == [[1]]
    assert isinstance(stream.events.get(timeout=WAIT_S), QueueRoom)
    assert stream.call.add([text(2)], waits=True)
    assert engine.next_batch() == [[2]]


def test_calls_that_wait_for_room_leave_the_last_quarter_to_light_clients(make: Make, engine: Engine) -> None:
    batcher = make(max_queue_texts=8)
    plugged(batcher, engine)
    streams = [Caller(batcher, client="flood") for _ in range(8)]
    assert [stream.call.add([text(n)], waits=True) for n, stream in enumerate(streams)] == 6 * [True] + 2 * [False]
    polite = Caller(batcher, client="polite").add(8).add(9)
    streams[0].close()
    assert isinstance(streams[7].events.get(timeout=WAIT_S), QueueRoom)
    assert not streams[7].call.add([text(7)], waits=True), "the polite one has its quarter"
    polite.close()
    assert streams[7].call.add([text(7)], waits=True)


def test_closing_a_waiting_call_costs_nothing_and_frees_the_queue(make: Make, engine: Engine) -> None:
    batcher = make(max_queue_texts=3)
    plug = plugged(batcher, engine)
    left = Caller(batcher).add(1, 2, 3)
    left.close()
    left.close()
    assert batcher.waiting_text_count == 0
    left.add(4)
    assert batcher.waiting_text_count == 0, "a closed call takes no more"
    Caller(batcher, client="b").add(5, 6, 7)
    engine.let_go(10)
    assert engine.next_batch() == [[5, 6, 7]]
    plug.next()
    assert left.events.empty()


def test_closing_a_call_leaves_the_others_of_its_client(make: Make, engine: Engine) -> None:
    batcher = make()
    plugged(batcher, engine)
    first, second, third = (Caller(batcher).add(n) for n in (1, 2, 3))
    second.close()
    engine.let_go(10)
    assert engine.next_batch() == [[1], [3]]
    first.next()
    third.next()


def test_a_call_closed_in_mid_batch_gets_no_further_events_and_holds_nothing(make: Make, engine: Engine) -> None:
    batcher = make()
    left, stays = Caller(batcher, LAYERS), Caller(batcher, LAYERS, client="b")
    plug = plugged(batcher, engine)
    left.add(1, 2)
    stays.add(3)
    engine.let_go()
    assert sorted(engine.next_batch()) == [[1, 2], [3]]
    assert batcher.held_bytes == 3 * 8 + 4
    left.close()
    assert batcher.held_bytes == 1 * 8 + 4
    engine.let_go()
    done = stays.next()
    stays.call.release(done.reserved_bytes, run_done=True)
    plug.call.release(plug.next().reserved_bytes, run_done=True)
    left.call.release(16, run_done=True)
    assert batcher.held_bytes == 0
    last = Caller(batcher).add(4)
    engine.let_go()
    last.next()
    assert left.events.empty()


@pytest.mark.parametrize("instance_busy", [False, True])
def test_an_expired_call_fails_and_is_never_encoded(make: Make, engine: Engine, instance_busy: bool) -> None:
    batcher = make()
    if instance_busy:
        plugged(batcher, engine)
    late = Caller(batcher, expires_at=time.monotonic() - 1).add(1, 2)
    if instance_busy:
        punctual = Caller(batcher, expires_at=time.monotonic() + 1000).add(3)
        engine.let_go()
        assert engine.next_batch() == [[3]]
        engine.let_go()
        punctual.next()
    error = late.failure()
    assert isinstance(error, DeadlineExceededError)
    assert batcher.waiting_text_count == 0
    late.close()
    assert late.events.empty() and engine.batches.empty()


def test_output_bytes_are_held_from_the_start_until_they_are_released(make: Make, engine: Engine) -> None:
    batcher = make()
    caller = Caller(batcher, LAYERS).add(1, 2, length=3)
    engine.next_batch()
    assert batcher.held_bytes == 2 * 3 * 8
    engine.let_go()
    parts = [caller.next(RowsReady) for _ in range(2)]
    done = caller.next()
    assert done.reserved_bytes == sum(len(part.rows.data) for part in parts) == 48
    for part, left in zip(parts, (24, 0), strict=True):
        caller.call.release(len(part.rows.data))
        assert batcher.held_bytes == left
    caller.call.release(0, run_done=True)
    caller.close()
    assert batcher.held_bytes == 0


def test_a_caller_who_does_not_read_is_passed_over_while_others_are_served(make: Make, engine: Engine) -> None:
    batcher = make(max_batch_tokens=2, max_call_output_bytes=32)
    engine.let_go(1000)
    stalled = Caller(batcher, LAYERS, client="stalled").add(*range(100, 120))
    held = [stalled.next() for _ in range(2)]
    assert [done.reserved_bytes for done in held] == [16, 16], "one batch more than there are instances"
    for n in range(20):
        other = Caller(batcher, LAYERS, client="other").add(n)
        other.call.release(other.next().reserved_bytes, run_done=True)
        other.close()
    assert stalled.events.empty()
    assert batcher.waiting_text_count == 16 and batcher.held_bytes == 32
    stalled.call.release(16, run_done=True)
    assert stalled.next().first_text == 4, "what was released is used again"
    stalled.close()
    assert batcher.waiting_text_count == 0 and batcher.held_bytes == 0


def test_a_call_may_hold_one_batch_more_than_there_are_instances(make: Make, engine: Engine) -> None:
    batcher = make(max_batch_tokens=1)
    engine.let_go(1000)
    caller = Caller(batcher).add(*range(10))
    caller.next()
    caller.next()
    other = Caller(batcher, client="b").add(50)
    other.next()
    assert caller.events.empty() and batcher.waiting_text_count == 8
    caller.call.release(4, run_done=True)
    assert caller.next().first_text == 2


def test_a_stalled_call_does_not_hide_another_of_the_same_client(make: Make, engine: Engine) -> None:
    batcher = make(max_batch_tokens=2, max_call_output_bytes=16)
    engine.let_go(1000)
    stalled = Caller(batcher, LAYERS).add(*range(100, 110))
    stalled.next()
    other = Caller(batcher, LAYERS).add(1)
    assert other.next().reserved_bytes == 8


def test_the_pool_of_all_calls_is_never_exceeded(make: Make, engine: Engine) -> None:
    batcher = make(max_output_bytes=40, max_call_output_bytes=40)
    engine.let_go(1000)
    callers = [Caller(batcher, LAYERS, client=str(n)).add(n, length=2) for n in range(5)]
    served: list[Caller] = []
    while len(served) < 5:
        poll(lambda: any(not caller.events.empty() for caller in callers if caller not in served))
        assert batcher.held_bytes <= 40
        caller = next(caller for caller in callers if caller not in served and not caller.events.empty())
        caller.call.release(caller.next().reserved_bytes, run_done=True)
        served.append(caller)
    assert batcher.held_bytes == 0


def test_one_text_larger_than_the_cap_of_a_call_is_served_alone(make: Make, engine: Engine) -> None:
    batcher = make(max_call_output_bytes=8, max_output_bytes=1000)
    engine.let_go(1000)
    caller = Caller(batcher, LAYERS).add(100, 200, length=10)
    assert len(caller.next().texts) == 1
    assert caller.events.empty()
    caller.call.release(80, run_done=True)
    assert caller.next().first_text == 1


def test_a_broken_batch_fails_its_calls_and_no_other(
    make: Make, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    batcher = make(max_batch_tokens=3)
    plugged(batcher, engine)
    engine.failing.add(13)
    callers = [Caller(batcher, LAYERS, client=str(n)).add(n) for n in (12, 13, 14, 15)]
    engine.let_go(10)
    for caller in callers[:3]:
        error = caller.failure()
        assert isinstance(error, InternalError)
        assert "broke" not in error.details, "what went wrong is for the log"
        caller.close()
    done = callers[3].next()
    callers[3].call.release(done.reserved_bytes, run_done=True)
    assert "the engine broke" in caplog.text
    last = Caller(batcher).add(16)
    last.next()
    assert batcher.held_bytes == 4 + 4, "only the plug's and the last one's are not released"


def test_one_text_that_cannot_be_sent_harms_no_other(make: Make, engine: Engine) -> None:
    batcher = make()
    engine.unsendable.add(2)
    plugged(batcher, engine)
    caller, other = Caller(batcher).add(1, 2, 3), Caller(batcher, client="b").add(4)
    engine.let_go(10)
    rows = caller.next(RowsReady).rows
    assert list(rows.failures) == [1] and isinstance(rows.failures[1], InvalidArgumentError)
    assert np.frombuffer(rows.data, "<f4")[[0, 2]].tolist() == [1001, 1003]
    assert len(caller.next().texts) == 3
    assert not other.next(RowsReady).rows.failures


def test_stopping_answers_what_waits_and_lets_what_runs_finish(make: Make, engine: Engine) -> None:
    batcher = make(max_batch_tokens=2)
    plug = plugged(batcher, engine)
    waiting = [Caller(batcher, client=client).add(n, n + 1, n + 2) for n, client in ((10, "a"), (20, "a"), (30, "b"))]
    stopping = threading.Thread(target=batcher.stop, args=(WAIT_S,))
    stopping.start()
    for caller in waiting:
        assert isinstance(caller.failure(), UnavailableError)
    assert batcher.waiting_text_count == 0
    with pytest.raises(UnavailableError) as caught:
        Caller(batcher).add(1)
    assert caught.value.retry_after_s is not None
    with pytest.raises(UnavailableError):
        plug.add(1)
    assert stopping.is_alive()
    engine.let_go()
    stopping.join(WAIT_S)
    assert not stopping.is_alive()
    assert plug.next(RowsReady).rows.data and plug.next()
    assert engine.batches.empty()
    assert all(instance.ended(0.0) for instance in batcher._instances.workers)


def test_adding_nothing_is_nothing(make: Make, engine: Engine) -> None:
    batcher = make()
    caller = Caller(batcher).add()
    assert batcher.waiting_text_count == 0
    caller.add(1)
    assert engine.next_batch() == [[1]]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    instance_count=st.integers(1, 3),
    client_count=st.integers(1, 4),
    max_batch_tokens=st.integers(1, 12),
    max_batch_bytes=st.integers(8, 200),
    max_call_output_bytes=st.integers(8, 200),
)
def test_every_text_is_answered_once_and_rightly_and_nothing_leaks(
    seed: int,
    instance_count: int,
    client_count: int,
    max_batch_tokens: int,
    max_batch_bytes: int,
    max_call_output_bytes: int,
) -> None:
    batcher = Batcher(
        [Engine(gated=False) for _ in range(instance_count)],
        QueueLimits(
            max_batch_tokens=max_batch_tokens,
            max_batch_bytes=max_batch_bytes,
            min_share_tokens=2,
            max_queue_texts=60,
            max_queue_tokens=200,
            max_output_bytes=max_call_output_bytes + 100,
            max_call_output_bytes=max_call_output_bytes,
        ),
    )
    problems: list[BaseException] = []

    def client(number: int) -> None:
        try:
            _live(batcher, str(number), random.Random(seed * 10 + number))
        except BaseException as exc:  # A thread's own failure is the test's.
            problems.append(exc)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(client_count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive(), "a caller was never answered"
    assert batcher.stop(WAIT_S)
    assert not problems, problems
    assert batcher.held_bytes == 0 and batcher.waiting_text_count == 0


def _live(batcher: Batcher, client: str, chance: random.Random) -> None:
    """Makes some calls; reads, checks and releases what comes, or leaves early."""
    for _ in range(chance.randint(1, 4)):
        plan = chance.choice([VECTORS, LAYERS, Plan(outputs=(VECTOR, LAYER), dtype="float32")])
        caller = Caller(batcher, plan, client=client)
        texts: list[Text] = []
        answered: dict[tuple[int, int, int], list[float]] = {}
        done_count = 0
        leaves_after = chance.choice([None, None, chance.randint(0, 5)])
        for _ in range(chance.randint(1, 5)):
            fresh = [text(chance.randint(0, 500), chance.randint(1, 6)) for _ in range(chance.randint(1, 5))]
            try:
                caller.call.add(fresh)
            except ResourceExhaustedError:
                continue
            texts.extend(fresh)
        while done_count < len(texts) and done_count != leaves_after:
            event = caller.events.get(timeout=WAIT_S)
            if isinstance(event, RowsReady):
                _note(event, plan, answered)
                caller.call.release(len(event.rows.data))
            else:
                assert isinstance(event, RunDone), event
                caller.call.release(0, run_done=True)
                done_count += len(event.texts)
        caller.close()
        for (n, output_index, layer), values in answered.items():
            assert values == wanted(plan.outputs[output_index], texts[n], layer)
        if done_count == len(texts):
            assert set(answered) == {
                (n, output_index, layer)
                for n in range(len(texts))
                for output_index, output in enumerate(plan.outputs)
                for layer in output.layers
            }


def _note(event: RowsReady, plan: Plan, answered: dict[tuple[int, int, int], list[float]]) -> None:
    output = plan.outputs[event.rows.output_index]
    values = np.frombuffer(event.rows.data, "<f4").tolist()
    for position, one in enumerate(event.texts):
        key = event.first_text + position, event.rows.output_index, event.rows.layer
        assert key not in answered, "a text was answered twice"
        (count,) = output.row_counts([one])
        answered[key], values = values[:count], values[count:]
    assert not values


def test_the_mixes_of_a_batch_are_bounded_but_one_text_always_comes(make: Make, engine: Engine) -> None:
    mix = Mix(mixing=Mixing.CONCAT, layers=(0, 1), row_size=25)
    output = Output(kind=OutputKind.POOLED_VECTORS, layers=(1,), row_size=1, pool=Pool(strategy=Strategy.CLS), mix=mix)
    plan = Plan(outputs=(output, output), dtype="float32")
    assert plan.mix_token_bytes == 100, "the same mix is held once"
    batcher = make(max_call_output_bytes=250)
    plugged(batcher, engine)
    for n in range(4):
        Caller(batcher, plan=plan).add(n)
    engine.let_go(10)
    assert [sum(map(len, engine.next_batch())) for _ in range(2)] == [2, 2]
    Caller(batcher, plan=plan).add(7, length=50)
    assert engine.next_batch() == [[7]]


def test_batches_are_short_while_callers_share_the_server(make: Make) -> None:
    sizes = []

    class Slow(Engine):
        def __call__(self, runs: Sequence[Run]) -> Iterator[Rows]:
            sizes.append(sum(len(run.texts) for run in runs))
            time.sleep(0.0002 * sizes[-1])  # What computing takes.
            return super().__call__(runs)

    batcher = make(Slow(gated=False), max_batch_tokens=900)
    crowd = Caller(batcher, client="crowd", reads=True).add(*range(900))
    crowd.next()
    assert sizes == [900]  # Alone, it has whole batches.
    crowd.add(*range(900))
    Caller(batcher, client="other", reads=True).add(1).next()
    crowd.add(*range(900, 990))
    answered = 0
    while answered < 990:
        answered += len(crowd.next().texts)
    assert max(sizes[2:]) <= 250
