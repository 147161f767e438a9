"""A synchronous channel with the methods that a stream needs of an asyncio one, so that one engine serves both.

The asyncio loop of a stream runs in a thread of its own. Here one more thread waits for answers and gives them to
that loop, at most two ahead of it: the flow control of gRPC then stops the server.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable
from typing import Any, Final

import grpc
import grpc.aio

from layertap._transport.status import CLOSED_DURING_CALL
from layertap.errors import CancelledError

_AHEAD_COUNT: Final = 2
_END_S: Final = 1.0


def end(call: Any, pid: int) -> None:
    """Cancels a call of a synchronous channel, and waits until gRPC's thread is through with it, for a moment at most.

    That thread dies where it is when the interpreter ends. A lock of the call that it holds then is never free again,
    and what takes it, be it the call's own `__del__`, hangs. Does nothing but in the process that began the call.
    """
    ended = threading.Event()
    if pid == os.getpid() and call.add_callback(ended.set):
        call.cancel()
        ended.wait(_END_S)


class DuplexChannel:
    """The part of `grpc.aio.Channel` that a stream uses, over a synchronous channel."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    def stream_stream(self, method: str, *_: Any) -> Callable[..., DuplexCall]:
        """Returns what begins a call."""
        return lambda _requests, metadata: DuplexCall(self._channel, method, metadata)

    def unary_unary(self, method: str, *_: Any) -> Callable[..., Any]:
        """Returns what makes a call and waits for its answer."""

        async def call(request: bytes, **settings: Any) -> Any:
            try:
                answer: Any = self._channel.unary_unary(method, None, None).future(request, **settings)
            except ValueError as exc:
                raise CancelledError(CLOSED_DURING_CALL) from exc
            try:
                return await asyncio.to_thread(answer.result)
            finally:
                answer.cancel()  # Or the interpreter would wait for its thread at its end.

        return call


class DuplexCall:
    """One call that is read and written on the running loop."""

    def __init__(self, channel: grpc.Channel, method: str, metadata: Any) -> None:
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        try:
            requests = iter(self._requests.get, None)
            self._call: Any = channel.stream_stream(method, None, None)(requests, metadata=metadata)
        except ValueError as exc:
            raise CancelledError(CLOSED_DURING_CALL) from exc
        self._loop = asyncio.get_running_loop()
        self._answers: asyncio.Queue[Any] = asyncio.Queue()
        self._room = threading.Semaphore(_AHEAD_COUNT)
        self._ended = threading.Event()
        if not self._call.add_callback(self._ended.set):
            self._ended.set()
        threading.Thread(target=self._receive, name="layertap-receive", daemon=True).start()

    async def read(self) -> Any:
        """Returns the next answer, or `grpc.aio.EOF`.

        Raises:
            grpc.RpcError: if the call has failed.
        """
        answer = await self._answers.get()
        self._room.release()
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def write(self, raw: bytes) -> None:
        """Gives a request to gRPC; the bound of unanswered items is the bound of what waits there."""
        self._requests.put(raw)

    async def done_writing(self) -> None:
        """Ends the requests."""
        self._requests.put(None)

    def cancel(self) -> None:
        """Ends the call and its threads."""
        self._requests.put(None)
        self._call.cancel()
        self._room.release()

    def _receive(self) -> None:
        answer: Any = None
        while not isinstance(answer, Exception) and answer is not grpc.aio.EOF:  # type: ignore[attr-defined]
            self._room.acquire()
            try:
                answer = next(self._call, grpc.aio.EOF)  # type: ignore[attr-defined]  # grpc-stubs lacks it
            except Exception as exc:
                answer = exc
            if isinstance(answer, Exception):
                self._ended.wait(_END_S)  # See `end`.
            try:
                self._loop.call_soon_threadsafe(self._answers.put_nowait, answer)
            except RuntimeError:  # The loop has closed: the stream has ended.
                return
