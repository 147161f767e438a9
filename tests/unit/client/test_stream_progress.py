"""How the parts of a stream wait for each other."""

from __future__ import annotations

import asyncio

from layertap._protocol.stream_state import StreamState
from layertap._transport.stream_calls import StreamProgress
from layertap.v1 import embedding_pb2 as pb


def progress() -> StreamProgress:
    return StreamProgress(StreamState(pb.EmbedOptions(), ordered=True))


async def steps_of_the_loop() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def check_that_only_those_wake_whose_condition_holds() -> None:
    one, came, looks = progress(), set[str](), {"a": 0, "b": 0}

    async def wait(name: str) -> None:
        def holds() -> bool:
            looks[name] += 1
            return name in came

        await one.until(holds)

    tasks = {name: asyncio.create_task(wait(name)) for name in "ab"}
    await steps_of_the_loop()
    one.note_change()
    await steps_of_the_loop()
    # Once before it waits, once at the change: it has not been woken to look again.
    assert looks == {"a": 2, "b": 2}
    came.add("b")
    one.note_change()
    await steps_of_the_loop()
    assert (tasks["a"].done(), tasks["b"].done()) == (False, True)
    came.add("a")
    one.note_change()
    await asyncio.wait_for(tasks["a"], 10)


async def check_that_what_was_taken_meanwhile_is_waited_for_again() -> None:
    one, room = progress(), 0

    async def take() -> None:
        nonlocal room
        await one.until(lambda: room > 0)
        room -= 1

    tasks = [asyncio.create_task(take()) for _ in range(2)]
    await steps_of_the_loop()
    room = 1
    one.note_change()
    await steps_of_the_loop()
    assert (room, sum(task.done() for task in tasks)) == (0, 1)
    room = 1
    one.note_change()
    await asyncio.wait_for(asyncio.gather(*tasks), 10)


async def check_that_a_cancelled_wait_leaves_nothing() -> None:
    one, looked = progress(), 0

    def never() -> bool:
        nonlocal looked
        looked += 1
        return False

    task = asyncio.create_task(one.until(never))
    await steps_of_the_loop()
    task.cancel()
    await asyncio.wait({task})
    before = looked
    one.note_change()
    assert looked == before


def test_only_those_wake_whose_condition_holds() -> None:
    asyncio.run(check_that_only_those_wake_whose_condition_holds())


def test_what_was_taken_meanwhile_is_waited_for_again() -> None:
    asyncio.run(check_that_what_was_taken_meanwhile_is_waited_for_again())


def test_a_cancelled_wait_leaves_nothing() -> None:
    asyncio.run(check_that_a_cancelled_wait_leaves_nothing())
