"""An asynchronous stream for synchronous callers: its loop runs in a thread of its own.

Whatever way the iteration ends, by itself, by an error, by the caller or by another thread, the generator is closed and
the thread ended, and nothing waits for what no longer runs.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import os
import queue
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final, TypeAlias, TypeVar

from layertap._transport.embed_stream import Groups
from layertap._transport.status import CLOSED_DURING_CALL
from layertap.errors import CancelledError
from layertap.results.streamed import StreamResult

_END_S: Final = 1.0
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, slots=True)
class _Failure:
    """What was raised instead of an answer."""

    error: BaseException


_Outcome: TypeAlias = "_T | _Failure"


class SyncBridge:
    """Runs an async generator on a loop in a thread of its own. The caller iterates it once and closes it."""

    def __init__(self, start: Callable[[], Groups]) -> None:
        self._start = start
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._groups: Groups | None = None
        self._step: asyncio.Task[Any] | None = None
        self._cancelled = False
        self._pid = os.getpid()

    def __iter__(self) -> Iterator[list[StreamResult]]:
        """Yields what the generator does.

        Raises:
            CancelledError: if `cancel` was called.
        """
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="layertap-stream", daemon=True)
        self._thread.start()
        # An iteration that is never finished would else be closed when its thread no longer runs, and wait for ever.
        atexit.register(self.close)
        while True:
            try:
                yield self._run(self._loop, self._advance)
            except StopAsyncIteration:
                return
            except asyncio.CancelledError as exc:
                raise CancelledError(CLOSED_DURING_CALL) from exc

    def cancel(self) -> None:
        """Lets the iteration end with an error, now or at its next step. To be called from any thread."""
        self._cancelled = True
        # The iterating thread may close the loop at the same time.
        with contextlib.suppress(RuntimeError):
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._cancel_step)

    def close(self) -> None:
        """Ends the generator and the thread; may be called again."""
        atexit.unregister(self.close)
        loop, self._loop = self._loop, None
        if loop is None or self._thread is None or self._pid != os.getpid():
            return  # A forked child has no such thread.
        self._run(loop, self._stop)
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()

    @staticmethod
    def _run(loop: asyncio.AbstractEventLoop, function: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Runs it on the loop, and waits for it.

        The coroutine is made over there: of one made here, Ctrl-C before the loop has it leaves a warning behind.
        """
        # A future waits by a lock of Python's own, which Ctrl-C may leave half released; this queue is C's.
        outcome: queue.SimpleQueue[_Outcome[_T]] = queue.SimpleQueue()
        loop.call_soon_threadsafe(lambda: loop.create_task(_put_outcome(function, outcome)))
        found = outcome.get()
        if isinstance(found, _Failure):
            raise found.error
        return found

    async def _advance(self) -> list[StreamResult]:
        if self._cancelled:
            raise CancelledError(CLOSED_DURING_CALL)
        self._groups, self._step = self._groups or self._start(), asyncio.current_task()
        return await anext(self._groups)

    def _cancel_step(self) -> None:
        if self._step is not None:
            self._step.cancel()

    async def _stop(self) -> None:
        if self._step is not None and not self._step.done():  # Ctrl-C leaves a step under way.
            self._step.cancel()
            await asyncio.gather(self._step, return_exceptions=True)
        if self._groups is not None:
            await self._groups.aclose()
        # What grpc still has to finish for a cancelled call.
        if rest := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(rest, timeout=_END_S)


async def _put_outcome(
    function: Callable[[], Coroutine[Any, Any, _T]], outcome: queue.SimpleQueue[_Outcome[_T]]
) -> None:
    """Puts what comes of it into the outcome; raised in a task, KeyboardInterrupt and SystemExit would end the loop."""
    try:
        outcome.put(await function())
    except BaseException as exc:
        outcome.put(_Failure(exc))
