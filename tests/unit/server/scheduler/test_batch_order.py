"""Which texts a batch is made of: round robin, in the order of arrival, within its budget."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence

import pytest
from support import poll
from support.queued import LAYERS, WAIT_S, Caller, Engine, Make, plugged

from layertap_server.types import Mix, Mixing, Output, OutputKind, Plan, Pool, Rows, Run, Strategy


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
