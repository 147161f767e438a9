"""The caller's own iterable: read in order, not far ahead, and never in the way of the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from types import FrameType
from typing import Any

import numpy as np
import pytest

from layertap import AsyncClient, Client, InvalidArgumentError
from layertap._transport import input_reader

WAIT_S = 20.0


async def gather(items: Any) -> list[Any]:
    async with contextlib.aclosing(input_reader.groups(items)) as groups:
        return [item async for group in groups for item in group]


def run(work: Any) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(WAIT_S):
            return await work

    return asyncio.run(bounded())


async def counted(count: int) -> AsyncIterator[int]:
    for n in range(count):
        yield n
        if n % 3 == 0:
            await asyncio.sleep(0)


@pytest.mark.parametrize("count", [0, 1, 7, 2000])
def test_a_source_gives_every_item_in_order(count: int) -> None:
    wanted = list(range(count))
    assert run(gather(wanted)) == wanted
    assert run(gather(iter(wanted))) == wanted
    assert run(gather(n for n in wanted)) == wanted
    assert run(gather(counted(count))) == wanted


class OurError(Exception):
    """The caller's own."""


@pytest.mark.parametrize(
    ("asynchronous", "kind"),
    # asyncio has its own way with the last two when they are raised inside an async generator.
    [(a, k) for a in (False, True) for k in (OurError, ValueError)]
    + [(False, StopAsyncIteration), (False, KeyboardInterrupt)],
)
def test_what_the_iterable_raises_comes_as_itself_after_all_before_it(
    asynchronous: bool, kind: type[BaseException]
) -> None:
    error = kind("mine")

    def plain() -> Iterator[int]:
        yield from range(5)
        raise error

    async def awaited() -> AsyncIterator[int]:
        async for n in counted(5):
            yield n
        raise error

    async def read() -> tuple[list[int], BaseException | None]:
        came: list[int] = []
        try:
            async with contextlib.aclosing(input_reader.groups(awaited() if asynchronous else plain())) as groups:
                async for group in groups:
                    came.extend(group)
        except (OurError, ValueError, RuntimeError, KeyboardInterrupt) as exc:
            return came, exc
        return came, None

    came, caught = run(read())
    assert came == list(range(5))
    # A generator cannot raise StopAsyncIteration: Python makes it a RuntimeError with the original as its cause.
    assert caught is error or (caught is not None and caught.__cause__ is error)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("items", [7, "one text", b"bytes", {"a": 1}], ids=repr)
def test_what_is_no_iterable_of_texts_is_refused_by_its_type_at_the_call(items: Any, kind: type[Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"^inputs is (of type|one) {type(items).__name__}; pass"):
        kind("127.0.0.1:1").embed_stream(items)


def test_a_blocking_iterable_blocks_neither_the_loop_nor_closing() -> None:
    go, left = threading.Event(), threading.Event()

    def blocking() -> Iterator[int]:
        try:
            yield 0
            go.wait(WAIT_S)
            yield 1
        finally:
            left.set()

    async def read() -> int:
        groups = input_reader.groups(blocking())
        assert await anext(groups) == [0]
        waiting = asyncio.ensure_future(anext(groups))
        steps = 0
        for _ in range(100):
            await asyncio.sleep(0)
            steps += 1
        assert not waiting.done()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await groups.aclose()
        return steps

    try:
        assert run(read()) == 100
        assert not left.is_set(), "closing waited for the iterable"
    finally:
        go.set()
    assert left.wait(WAIT_S), "the iterable was never let go"


def test_a_source_is_not_read_far_ahead() -> None:
    taken = 0
    full = threading.Event()

    def endless() -> Iterator[int]:
        nonlocal taken
        while True:
            taken += 1
            if taken >= input_reader._AHEAD_COUNT:
                full.set()
            yield taken

    async def read() -> None:
        groups = input_reader.groups(endless())
        await anext(groups)
        assert await asyncio.to_thread(full.wait, WAIT_S)
        await groups.aclose()

    run(read())
    assert taken <= 2 * input_reader._AHEAD_COUNT + 2


def test_an_item_is_given_before_the_next_is_asked_for() -> None:
    """A caller may make an item only when it has seen what came of the last one."""
    seen = threading.Semaphore(0)

    def careful() -> Iterator[int]:
        for n in range(200):
            yield n
            assert seen.acquire(timeout=WAIT_S)

    async def read() -> list[int]:
        came = []
        async for group in input_reader.groups(careful()):
            came.extend(group)
            seen.release(len(group))
        return came

    assert run(read()) == list(range(200))


@pytest.mark.parametrize("what", ["an item", "the end"])
@pytest.mark.parametrize("moment", range(16))
def test_what_comes_at_any_moment_wakes_the_loop(what: str, moment: int) -> None:
    """The thread moves exactly when the loop is about to run its line number `moment` of input_reader.py."""
    go, handed_over, done = threading.Event(), threading.Event(), threading.Event()
    threads: list[threading.Thread] = []
    lines = 0

    def careful() -> Iterator[int]:
        threads.append(threading.current_thread())
        yield 0
        assert go.wait(WAIT_S)
        if what == "an item":
            yield 1
            handed_over.set()
            done.wait(WAIT_S)  # Nothing after this item wakes the loop by chance.

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != input_reader.__file__:
            return None
        lines += event == "line"
        if event == "line" and lines == moment + 1:
            go.set()
            if what == "an item":
                assert handed_over.wait(WAIT_S)
            else:
                threads[0].join(WAIT_S)
        return trace

    async def read() -> list[int] | None:
        groups = input_reader.groups(careful())
        assert await anext(groups) == [0]
        waiting = asyncio.ensure_future(anext(groups, None))
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        finally:
            sys.settrace(before)
        go.set()  # The loop has fallen asleep before it came to that line.
        try:
            async with asyncio.timeout(3):
                return await waiting
        finally:
            done.set()
            await groups.aclose()

    assert run(read()) == ([1] if what == "an item" else None)


def test_numpy_rows_are_items() -> None:
    rows = np.arange(6).reshape(3, 2)
    assert [row.tolist() for row in run(gather(rows))] == rows.tolist()
