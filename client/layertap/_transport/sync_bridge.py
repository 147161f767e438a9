"""An asynchronous stream for synchronous callers: its loop runs in a thread of its own.

Whatever way the iteration ends, by itself, by an error, by the caller, by another thread or as garbage, the stream is
closed and the thread ended, and nothing waits for what no longer runs.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import queue
import threading
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from layertap._transport.embed_stream import EmbedStream
from layertap._transport.status import CLOSED_DURING_CALL
from layertap.errors import CancelledError
from layertap.results.streamed import StreamResult

_END_S: Final = 1.0

_Outcome: TypeAlias = "queue.SimpleQueue[list[StreamResult] | BaseException]"


class SyncBridge:
    """Runs a stream on a loop in a thread of its own."""

    def __init__(self, start: Callable[[], EmbedStream]) -> None:
        self._start = start
        self._stream: EmbedStream | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._step: asyncio.Task[Any] | None = None
        self._cancelled = False
        self._pid = os.getpid()

    def next_group(self) -> list[StreamResult]:
        """Returns what the stream's own `next_group` does.

        Raises:
            CancelledError: if `cancel` was called.
        """
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=_run, args=(self._loop,), name="layertap-stream", daemon=True)
            self._thread.start()
            # An iteration that is never finished would else be closed when its thread no longer runs.
            atexit.register(self.close)
        loop = self._loop
        # A future waits by a lock of Python's own, which Ctrl-C may leave half released; this queue is C's.
        outcome: _Outcome = queue.SimpleQueue()
        # The coroutine is made over there: of one made here, Ctrl-C before the loop has it leaves a warning behind.
        loop.call_soon_threadsafe(lambda: loop.create_task(self._advance(outcome)))
        found = outcome.get()
        if isinstance(found, asyncio.CancelledError):
            raise CancelledError(CLOSED_DURING_CALL) from found
        if isinstance(found, BaseException):
            raise found
        return found

    def cancel(self) -> None:
        """Lets the iteration end with an error, now or at its next step. To be called from any thread."""
        self._cancelled = True
        if (loop := self._loop) is not None:
            with contextlib.suppress(RuntimeError):  # The iterating thread may close it at the same time.
                loop.call_soon_threadsafe(self._cancel_step)

    def close(self) -> None:
        """Ends the stream and the thread; may be called again."""
        atexit.unregister(self.close)
        loop, self._loop = self._loop, None
        if loop is None or self._thread is None or self._pid != os.getpid():
            return  # A forked child has no such thread.
        loop.call_soon_threadsafe(lambda: loop.create_task(self._stop(loop)))
        if threading.current_thread() is not self._thread:  # Any thread may be the one that collects garbage.
            self._thread.join()

    async def _advance(self, outcome: _Outcome) -> None:
        """Puts the next group into the outcome, or what was raised: KeyboardInterrupt in a task would end the loop."""
        self._step = asyncio.current_task()
        try:
            if self._cancelled:
                raise asyncio.CancelledError
            self._stream = self._stream or self._start()
            outcome.put(await self._stream.next_group())
        except BaseException as exc:
            outcome.put(exc)

    def _cancel_step(self) -> None:
        if self._step is not None:
            self._step.cancel()

    async def _stop(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            if self._step is not None and not self._step.done():  # Ctrl-C leaves a step under way.
                self._step.cancel()
                await asyncio.gather(self._step, return_exceptions=True)
            if self._stream is not None:
                await self._stream.close()
            # What grpc still has to finish for a cancelled call.
            if rest := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(rest, timeout=_END_S)
        finally:
            loop.stop()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()
