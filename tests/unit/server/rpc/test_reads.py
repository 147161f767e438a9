"""How many messages of one client come in at once."""

from __future__ import annotations

import asyncio

from layertap_server.scheduler.fairness import MAX_READS, Reads


async def begun(reads: Reads, client: str, count: int) -> list[asyncio.Task[None]]:
    """Returns so many tasks that begin to read, each as far as it comes at once."""
    tasks = [asyncio.create_task(reads.begin(client, n)) for n in range(count)]
    await asyncio.sleep(0)
    return tasks


def test_only_some_messages_of_a_client_come_in_at_once() -> None:
    async def run() -> None:
        reads = Reads()
        tasks = await begun(reads, "a", 2 * MAX_READS)
        assert [task.done() for task in tasks] == [True] * MAX_READS + [False] * MAX_READS
        for n in range(MAX_READS):
            reads.end("a", n)
            await tasks[MAX_READS + n]
        (other,) = await begun(reads, "b", 1)
        assert other.done()  # Another client has its own.

    asyncio.run(run())


def test_what_does_not_come_whole_holds_up_no_other() -> None:
    async def run() -> None:
        reads = Reads()
        tasks = await begun(reads, "a", 3 * MAX_READS)
        async with asyncio.timeout(10):
            await asyncio.gather(*tasks)

    asyncio.run(run())


def test_a_caller_that_leaves_while_it_waits_leaves_nothing() -> None:
    async def run() -> None:
        reads = Reads()
        tasks = await begun(reads, "a", MAX_READS + 2)
        tasks[-2].cancel()
        await asyncio.gather(tasks[-2], return_exceptions=True)
        reads.end("a", 0)
        await tasks[-1]
        for n in range(MAX_READS + 2):
            reads.end("a", n)
        assert not reads._started and not reads._waiting

    asyncio.run(run())
