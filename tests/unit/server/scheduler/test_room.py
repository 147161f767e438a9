"""What may wait and what may be held: limits of the queue and of output bytes, and who is refused or passed over."""

from __future__ import annotations

import pytest
from support import poll
from support.queued import LAYERS, WAIT_S, Caller, Engine, Make, plugged, text

from layertap import (
    ResourceExhaustedError,
)
from layertap_server.scheduler.events import QueueRoom, RowsReady


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
