"""The order of waiting calls, the budgets that clients share, and what taking a batch costs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from support import poll

from layertap import ResourceExhaustedError
from layertap_server.scheduler.batcher import Batcher
from layertap_server.scheduler.call import Call, Hooks
from layertap_server.scheduler.events import Event, RunDone
from layertap_server.scheduler.fairness import Budget, FairQueue, RequestMemory
from layertap_server.scheduler.queue_limits import QueueLimits
from layertap_server.types import Output, OutputKind, Plan, Pool, Rows, Run, Strategy, Text

PLAN = Plan(
    outputs=(Output(kind=OutputKind.POOLED_VECTORS, layers=(1,), row_size=1, pool=Pool(strategy=Strategy.CLS)),),
    dtype="float32",
)
WAIT_S = 20.0


class NoQueue:
    def add(self, call: Call, texts: Sequence[Text], waits: bool) -> bool:
        return True

    def release(self, call: Call, byte_count: int, run_done: bool) -> None: ...

    def close(self, call: Call) -> None: ...


def call(arrival: int, client: str, connection: str = "") -> Call:
    made = Call(NoQueue(), PLAN, client=client, connection=connection, deliver=lambda _: None, expires_at=None)
    made.arrival = arrival
    return made


def served(waiting: FairQueue, count: int) -> list[int]:
    """Serves the first call so often; returns the arrivals."""
    found = []
    for _ in range(count):
        one = waiting.first
        assert one
        found.append(one.arrival)
        waiting.rotate(one.client, one.connection)
    return found


def test_clients_then_connections_are_served_round_robin_and_calls_of_one_as_they_came() -> None:
    waiting = FairQueue()
    places = [("a", "1"), ("a", "1"), ("a", "2"), ("b", "1"), ("c", "1")]
    calls = [call(n, client, connection) for n, (client, connection) in enumerate(places)]
    for one in calls:
        waiting.add(one)
    assert served(waiting, 8) == [0, 3, 4, 2, 3, 4, 0, 3]
    waiting.remove(calls[0])
    waiting.remove(calls[3])
    assert served(waiting, 4) == [4, 2, 4, 1]
    for n in (1, 2, 4):
        waiting.remove(calls[n])
    assert not waiting and waiting.first is None


@pytest.mark.parametrize("key", ["client", "connection"])
def test_what_had_nothing_waiting_comes_before_what_the_last_batch_has_served(key: str) -> None:
    waiting = FairQueue()

    def add(arrival: int, name: str) -> None:
        waiting.add(call(arrival, name) if key == "client" else call(arrival, "a", name))

    for n, name in enumerate(("one", "two", "three")):
        add(n, name)
    waiting.begin_batch()
    assert served(waiting, 2) == [0, 1]
    add(3, "new")  # Behind "three", which waits, and before those that have just been served.
    add(4, "newer")
    assert [one.arrival for one in waiting] == [2, 3, 4, 0, 1]
    waiting.begin_batch()
    assert served(waiting, 1) == [2]
    add(5, "newest")  # Not before "one" and "two" again, which would then never be served.
    assert [one.arrival for one in waiting] == [3, 4, 0, 1, 5, 2]


def test_a_call_that_comes_back_stands_by_its_arrival_and_one_put_back_is_next() -> None:
    waiting = FairQueue()
    calls = [call(n, client) for n, client in enumerate("aab")]
    for one in calls:
        waiting.add(one)
    waiting.remove(calls[0])
    waiting.add(calls[0])
    assert list(waiting) == calls
    waiting.remove(calls[2])
    waiting.put_back(calls[2])
    assert waiting.first is calls[2]


def test_the_last_quarter_of_a_budget_is_for_clients_that_use_little() -> None:
    budget = Budget(100)
    assert budget.has_room("a", 100) and not budget.has_room("a", 101)
    budget.add("a", 75)
    assert not budget.has_room("a", 1)
    assert budget.has_room("b", 25)
    budget.add("b", 20)
    assert budget.has_room("b", 5) and not budget.has_room("b", 6)
    budget.add("a", -75)
    assert budget.used == 20 and budget.has_room("c", 80)


class Engine:
    """An `encode` that says when it has begun, and waits for leave."""

    def __init__(self) -> None:
        self.begun, self.leave = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, runs: Sequence[Run]) -> Iterator[Rows]:
        self.begun.release()
        assert self.leave.acquire(timeout=WAIT_S)
        for index, run in enumerate(runs):
            data = memoryview(bytes(4 * len(run.texts)))
            yield Rows(run_index=index, output_index=0, layer=1, data=data, failures={})


def test_taking_a_batch_does_not_look_at_calls_that_have_too_much_unsent(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    batcher = Batcher(
        [engine],
        QueueLimits(
            max_batch_tokens=1000,
            max_batch_bytes=1 << 20,
            min_share_tokens=1,
            max_queue_texts=10_000,
            max_queue_tokens=10_000,
            max_output_bytes=1 << 20,
            max_call_output_bytes=4,
        ),
    )
    one = Text(np.zeros(1, np.int32))
    events: queue.Queue[Event] = queue.Queue()
    looked_at = []
    bytes_of = Call.bytes_of
    try:
        engine.leave.release()
        plug = batcher.open(PLAN, client="plug", deliver=events.put)
        plug.add([one])
        while not isinstance(events.get(timeout=WAIT_S), RunDone):
            pass
        stalled = [batcher.open(PLAN, client="stalled", deliver=lambda _: None) for _ in range(50)]
        for each in stalled:
            each.add([one, one])  # The first may be held; the second must wait until it has been sent.
        engine.leave.release(60)
        poll(lambda: batcher.waiting_text_count == 50 and batcher.idle_instance_count == 1)
        monkeypatch.setattr(Call, "bytes_of", lambda self, text: looked_at.append(self) or bytes_of(self, text))
        for n in range(10):
            other = batcher.open(PLAN, client=str(n), deliver=events.put)
            other.add([one])
            while not isinstance(events.get(timeout=WAIT_S), RunDone):
                pass
            other.close()
        assert not set(stalled) & set(looked_at) and len(looked_at) == 10
    finally:
        engine.leave.release(1000)
        batcher.stop(WAIT_S)


def test_the_memory_of_requests_is_given_back_to_the_client_that_held_it() -> None:
    memory = RequestMemory(100, Hooks())
    for _ in range(3):  # Held for ever, the second time would find no room.
        memory.add("a", 75)
        with pytest.raises(ResourceExhaustedError, match="take 75 bytes, the most is 100"):
            memory.add("a", 1)
        memory.add("b", 25)
        memory.give_back("b", 25)
        memory.give_back("a", 75)
