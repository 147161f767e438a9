"""One connection of HTTP/1.1: uvicorn's protocol with an end to every wait.

Rules:
- A connection without a request is closed after a time, also one that sends its headers byte by byte.
- Above a number of connections the one that has been without a request for longest is closed.
- A caller that leaves cancels the task of its request.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState


class Connection(H11Protocol):
    """One connection, which requests find in their state.

    `idle` are those of all connections that have no request, the oldest first; `max_count` is the most connections.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        *,
        idle: dict[Connection, None],
        max_count: int,
        idle_timeout_s: float,
    ) -> None:
        super().__init__(config, server_state, {"connection": self})
        self._idle, self._max_count, self._idle_timeout_s = idle, max_count, idle_timeout_s
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[Any] | None = None
        self.lost = asyncio.Event()

    @property
    def certificate(self) -> Mapping[str, Any]:
        """The client's certificate; empty: it has shown none."""
        return self.transport.get_extra_info("peercert") or {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        # What is sent next so waits until all before it has left, and a caller that does not read is found out.
        transport.set_write_buffer_limits(high=1, low=0)
        self._wait()
        if len(self.connections) > self._max_count:
            oldest = next(iter(self._idle))
            del self._idle[oldest]
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        super().connection_lost(exc)
        self.lost.set()
        self._stop_waiting()
        if self._task is not None:
            self._task.cancel()

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Belongs around all that the current task does for a request."""
        self._stop_waiting()
        self._task = asyncio.current_task()
        try:
            yield
        finally:
            self._task = None
            if not self.lost.is_set():
                self._wait()

    async def cut(self) -> None:
        """Closes the connection at once, whatever is still to be sent."""
        self._task = None
        self.transport.abort()
        await self.lost.wait()

    def _wait(self) -> None:
        self._idle[self] = None
        self._timer = self.loop.call_later(self._idle_timeout_s, self.transport.abort)

    def _stop_waiting(self) -> None:
        self._idle.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
