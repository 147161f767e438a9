"""A TCP proxy on loopback that does to connections what networks do: delays, throttles, swallows and cuts them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Self

CHUNK_BYTES = 16 << 10
WAIT_S = 30.0


class Proxy:
    """Passes connections on to a server, in a thread of its own.

    Attributes:
        delay_s: How much later each chunk of an answer goes on.
        bytes_a_second: How fast answers go on; 0: as fast as they can.
        cut_after: How many bytes of answers each new connection passes before it is cut: one number a connection, used
            up in order, then none is cut.
        cut_count: How many connections have been cut so.
    """

    def __init__(self, target: str) -> None:
        self._host, port = target.rsplit(":", 1)
        self._port = int(port)
        self.delay_s = 0.0
        self.bytes_a_second = 0
        self.cut_after: list[int] = []
        self.cut_count = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._passing = asyncio.Event()
        self._passing.set()
        self._server = self._run(asyncio.start_server(self._connected, "127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self._loop.close()

    def swallow(self, swallowing: bool) -> None:
        """Passes nothing on in either direction while all connections stay open; or goes on where it was."""
        self._loop.call_soon_threadsafe(self._passing.clear if swallowing else self._passing.set)

    def cut(self) -> None:
        """Cuts all connections that there are."""
        self._run(self._cut(set(self._writers)))

    def _run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT_S)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._writers.add(writer)
        cut_after = self.cut_after.pop(0) if self.cut_after else None
        with contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
            self._writers.add(far_writer)
            both = {writer, far_writer}
            await asyncio.gather(
                self._pass_on(reader, far_writer, both, None), self._pass_on(far_reader, writer, both, cut_after)
            )
            self._writers.discard(far_writer)
        self._writers.discard(writer)
        writer.close()

    async def _pass_on(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        both: set[asyncio.StreamWriter],
        cut_after: int | None,
    ) -> None:
        answers = writer.get_extra_info("sockname")[1] == self._server.sockets[0].getsockname()[1]
        passed = 0
        with contextlib.suppress(OSError):
            while chunk := await reader.read(CHUNK_BYTES):
                await self._passing.wait()
                if answers:
                    pause = len(chunk) / self.bytes_a_second if self.bytes_a_second else 0.0
                    await asyncio.sleep(self.delay_s + pause)
                    passed += len(chunk)
                    if cut_after is not None and passed > cut_after:
                        self.cut_count += 1
                        break
                writer.write(chunk)
                await writer.drain()
        await self._cut(both)

    async def _cut(self, writers: set[asyncio.StreamWriter]) -> None:
        for writer in writers:
            writer.transport.abort()

    async def _end(self) -> None:
        self._server.close()
        await self._cut(set(self._writers))
        self._passing.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
