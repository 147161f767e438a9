"""Events cross from the threads of instances into an event loop: none is lost, and none wakes a reader at work."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from layertap_server.scheduler.call import EventQueue, LoopWaker


class CountedWakes(LoopWaker):
    """Counts what the loop is woken for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def add(self, callback: Callable[[], None]) -> None:
        self.count += 1
        super().add(callback)


def test_every_event_comes_once_and_in_order_while_another_thread_adds_them() -> None:
    count = 20_000

    async def read() -> list[int]:
        queue: EventQueue[int] = EventQueue(LoopWaker())
        thread = threading.Thread(target=lambda: [queue.put(n) for n in range(count)])
        thread.start()
        found: list[int] = []
        while len(found) < count:
            found += await queue.take()
            await asyncio.sleep(0)
        thread.join()
        return found

    assert asyncio.run(asyncio.wait_for(read(), 60)) == list(range(count))


def test_only_a_reader_that_waits_is_woken() -> None:
    async def read() -> None:
        waker = CountedWakes()
        queue: EventQueue[int] = EventQueue(waker)
        for n in range(10):
            queue.put(n)
        assert await queue.take() == list(range(10)) and waker.count == 0
        reading = asyncio.create_task(queue.take())
        await asyncio.sleep(0)
        await asyncio.to_thread(queue.put, 10)
        assert await reading == [10] and waker.count == 1
        queue.put(11)
        assert await queue.take() == [11] and waker.count == 1

    asyncio.run(asyncio.wait_for(read(), 60))
