"""What comes of a call: each text answered once and rightly, by rows, a failure or a deadline."""

from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.queued import LAYER, LAYERS, VECTOR, VECTORS, WAIT_S, Caller, Engine, Make, plugged, text, wanted

from layertap import (
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from layertap_server.scheduler.batcher import Batcher
from layertap_server.scheduler.events import RowsReady, RunDone
from layertap_server.scheduler.queue_limits import QueueLimits
from layertap_server.types import Plan, Text


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


def test_closing_a_call_leaves_the_others_of_its_client(make: Make, engine: Engine) -> None:
    batcher = make()
    plugged(batcher, engine)
    first, second, third = (Caller(batcher).add(n) for n in (1, 2, 3))
    second.close()
    engine.let_go(10)
    assert engine.next_batch() == [[1], [3]]
    first.next()
    third.next()


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
    assert all(instance.ended(0.0) for instance in batcher.workers)


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
