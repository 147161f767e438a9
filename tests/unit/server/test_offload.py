"""Work in threads: clients round robin, slices of a list in order, and nothing is begun for a caller that has left."""

from __future__ import annotations

import asyncio
import itertools
import threading

import pytest

from layertap_server.cores import core_count
from layertap_server.protocol.offload import FairThreads, Slices


def test_clients_are_served_round_robin() -> None:
    done: list[str] = []

    async def run() -> None:
        threads = FairThreads(1)
        works = [threads.submit(client, lambda c=client: done.append(c)) for client in "aaaabbc"]  # type: ignore[misc]
        await asyncio.gather(*works)

    asyncio.run(run())
    assert done == list("aabcaba") or done == list("abcabaa")  # The first one runs at once.


def test_what_is_cancelled_before_it_has_begun_is_never_done() -> None:
    done: list[int] = []

    async def run() -> None:
        threads, may_go_on = FairThreads(1), threading.Event()
        first = threads.submit("a", may_go_on.wait)
        dropped = threads.submit("a", lambda: done.append(1))
        last = threads.submit("a", lambda: done.append(2))
        dropped.cancel()
        may_go_on.set()
        await asyncio.gather(first, last)

    asyncio.run(run())
    assert done == [2]


def test_the_slices_of_a_list_come_in_order_whatever_their_size() -> None:
    sizes = [1, 1, 50, 1, 30, 30, 2, 1]
    noted: list[list[int]] = []

    async def run() -> list[int]:
        slices = Slices()
        return await slices.run(
            lambda part: list(range(part.start, part.stop)), sizes, client="a", most=40, large=5, note=noted.append
        )

    assert asyncio.run(run()) == list(range(len(sizes)))
    assert [n for found in noted for n in found] == list(range(len(sizes)))


def test_a_fault_ends_the_run_and_the_slices_after_it() -> None:
    begun: list[int] = []

    def work(part: slice) -> list[int]:
        begun.append(part.start)
        raise ValueError(part.start)

    async def run() -> None:
        await Slices().run(work, [10] * 1000, client="a", most=10, large=1)

    with pytest.raises(ValueError, match="0"):
        asyncio.run(run())
    assert len(begun) < 1000


def test_no_more_slices_of_a_list_are_under_way_than_there_are_threads() -> None:
    ahead: list[int] = []
    began = taken = 0

    def work(_: slice) -> list[int]:
        nonlocal began
        began += 1
        ahead.append(began - taken)
        return [began]

    def note(_: list[int]) -> None:
        nonlocal taken
        taken += 1

    asyncio.run(Slices().run(work, [10] * 200, client="a", most=10, large=1, note=note))
    assert taken == began == 200 and max(ahead) <= max(1, core_count() - 1)


def test_the_event_loop_runs_between_slices_that_need_no_thread() -> None:
    steps: list[str] = []

    async def other() -> None:
        while True:
            steps.append("other")
            await asyncio.sleep(0)

    async def run() -> None:
        task = asyncio.create_task(other())
        await Slices().run(lambda _: [steps.append("slice")], [1] * 2560, client="a", most=10_000, large=10_000)
        task.cancel()

    asyncio.run(run())
    assert steps.count("slice") == 10
    assert all(pair != ("slice", "slice") for pair in itertools.pairwise(steps))
