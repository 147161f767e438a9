"""Work that would hold up the event loop: it runs in threads, in slices.

A slice is at most one piece of work of a thread. So slices of several callers alternate, and a caller that has left
costs at most the slice under way. Short work stays on the event loop: a thread would cost more than the work.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

T = TypeVar("T")

LARGE_BYTES: Final = 64 << 10
"""Parsing and packing of more leave the event loop."""
_SLICE_ENTRIES: Final = 256


async def offload(work: Callable[[], T], *, in_thread: bool) -> T:
    """Returns the result of some work, done in a thread if it takes long."""
    return await asyncio.to_thread(work) if in_thread else work()


class Slices:
    """Runs the work of one tokenizer slice by slice, in threads of its own."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max(2, os.cpu_count() or 1), thread_name_prefix="tokenize")

    async def run(
        self,
        work: Callable[[slice], list[T]],
        sizes: Sequence[int],
        *,
        most: int,
        large: int,
        note: Callable[[list[T]], None] = lambda _: None,
    ) -> list[T]:
        """Returns the results of all slices of a list, in order.

        Args:
            work: Returns the results of a slice; what it raises ends the run.
            sizes: The size of each entry.
            most: The largest size of a slice; a larger entry is a slice of its own.
            large: Slices above this size run in a thread.
            note: Called on the event loop with the results of each slice; what it raises ends the run.
        """
        results: list[T] = []
        for part, size in _cut(sizes, most):
            if size > large:
                found = await asyncio.get_running_loop().run_in_executor(self._executor, work, part)
            else:
                found = work(part)
            note(found)
            results += found
        return results


def _cut(sizes: Sequence[int], most: int) -> Iterator[tuple[slice, int]]:
    """Yields consecutive slices of a list, each with its size."""
    start = total = 0
    for end, size in enumerate(sizes):
        if end > start and (total + size > most or end - start == _SLICE_ENTRIES):
            yield slice(start, end), total
            start, total = end, 0
        total += size
    if sizes:
        yield slice(start, len(sizes)), total
