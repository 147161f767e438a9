"""Idle calls end by one timer, each at its own time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from layertap.errors import DeadlineExceededError, LayertapError
from layertap_server.observability.call_log import Record
from layertap_server.rpc.caller import AdmittedCall, Deadlines, Shared
from layertap_server.rpc.stream_memory import StreamMemory
from layertap_server.scheduler.call import Hooks
from layertap_server.scheduler.fairness import Reads, RequestMemory


def late(name: str) -> Callable[[], LayertapError]:
    return lambda: DeadlineExceededError(name)


def test_each_idle_call_ends_at_its_time_and_a_busy_one_does_not() -> None:
    async def run() -> None:
        shared = Shared(
            memory=RequestMemory(1000, Hooks()),
            streams=StreamMemory(1000),
            deadlines=Deadlines(),
            reads=Reads(),
            stall_timeout_s=60,
            idle_timeout_s=60,
        )
        ended: list[str] = []

        async def call(name: str, timeout_s: float, *, busy: bool = False) -> None:
            task = asyncio.current_task()
            assert task is not None
            record = Record(method="Embed", request_id=name, client="c")
            admitted = AdmittedCall(record, task, shared, connection="")
            admitted.set_idle(timeout_s, late(name))
            if busy:
                admitted.set_busy()
                return
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                assert admitted.ending is not None
                ended.append(admitted.ending.details)
            finally:
                admitted.close()

        calls = [call("long", 0.2), call("short", 0.01), call("busy", 0.005, busy=True), call("middle", 0.1)]
        await asyncio.wait_for(asyncio.gather(*calls), 30)
        assert ended == ["short", "middle", "long"]

    asyncio.run(run())
