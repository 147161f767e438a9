"""Work that would hold up the event loop: it runs in threads, in slices.

A slice is at most one piece of work of a thread. So slices of several clients alternate, and a caller that has left
costs at most the slices under way. Short work stays on the event loop: a thread would cost more than the work.
"""

from __future__ import annotations

import asyncio
import functools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from layertap_server.cores import core_count

T = TypeVar("T")

LARGE_BYTES: Final = 64 << 10
"""Parsing and packing of more leave the event loop."""
SLICE_ENTRIES: Final = 256
"""Entries of a slice, however small they are."""


async def offload(work: Callable[[], T], *, in_thread: bool) -> T:
    """Returns the result of some work, done in a thread if it takes long."""
    return await asyncio.to_thread(work) if in_thread else work()


class FairThreads:
    """Threads that do the work of clients round robin: one that has much to do does not hold up the others."""

    def __init__(self, count: int) -> None:
        """Makes threads; they start when there is work.

        Args:
            count: How many.
        """
        self.count = count
        self._free_count = count
        self._executor = ThreadPoolExecutor(count, thread_name_prefix="tokenize")
        self._waiting: OrderedDict[str, deque[tuple[Callable[[], Any], asyncio.Future[Any]]]] = OrderedDict()

    def submit(self, client: str, work: Callable[[], T]) -> asyncio.Future[T]:
        """Returns the future result of some work. What is cancelled before it has begun is never done."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append((work, future))
        self._start()
        return future

    def _start(self) -> None:
        while self._free_count and self._waiting:
            client, works = next(iter(self._waiting.items()))
            work, future = works.popleft()
            if works:
                self._waiting.move_to_end(client)
            else:
                del self._waiting[client]
            if not future.cancelled():
                self._free_count -= 1
                running = asyncio.get_running_loop().run_in_executor(self._executor, work)
                running.add_done_callback(functools.partial(self._end, future))

    def _end(self, future: asyncio.Future[T], done: asyncio.Future[T]) -> None:
        self._free_count += 1
        error = done.exception()
        if not future.cancelled():
            if error is None:
                future.set_result(done.result())
            else:
                future.set_exception(error)
        self._start()


class Slices:
    """Runs the work of one tokenizer slice by slice, in threads of its own."""

    def __init__(self) -> None:
        # One core stays free for the event loop, which is all that short calls need.
        self._threads = FairThreads(max(1, core_count() - 1))

    async def run(
        self,
        work: Callable[[slice], list[T]],
        sizes: Sequence[int],
        *,
        client: str,
        most: int,
        large: int,
        note: Callable[[list[T]], None] = lambda _: None,
    ) -> list[T]:
        """Returns the results of all slices of a list, in order.

        Args:
            work: Returns the results of a slice, in any thread; what it raises ends the run.
            sizes: The size of each entry.
            client: The client that the list belongs to.
            most: The largest size of a slice; a larger entry is a slice of its own.
            large: Slices above this size run in a thread.
            note: Called on the event loop with the results of each slice, in order; what it raises ends the run.
        """
        results: list[T] = []
        under_way: deque[asyncio.Future[list[T]]] = deque()

        async def take() -> None:
            found = await under_way[0]
            under_way.popleft()
            note(found)
            results.extend(found)

        try:
            for part, size in _cut(sizes, most):
                if size <= large and not under_way:
                    found = work(part)
                    note(found)
                    results += found
                    await asyncio.sleep(0)  # Others need the event loop in between.
                    continue
                under_way.append(self._threads.submit(client, functools.partial(work, part)))
                if len(under_way) == self._threads.count:
                    await take()
            while under_way:
                await take()
        finally:
            for future in under_way:
                future.cancel()
        return results


def _cut(sizes: Sequence[int], most: int) -> Iterator[tuple[slice, int]]:
    """Yields consecutive slices of a list, each with its size."""
    start = total = 0
    for end, size in enumerate(sizes):
        if end > start and (total + size > most or end - start == SLICE_ENTRIES):
            yield slice(start, end), total
            start, total = end, 0
        total += size
    if sizes:
        yield slice(start, len(sizes)), total
