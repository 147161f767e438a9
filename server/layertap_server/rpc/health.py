"""The standard health service, which can tell when its watchers know that the server stops.

grpc_health's own sets a status and returns; a server that then cuts its connections may cut a watcher that has not yet
been sent the status. Here `end_watches` lets each `Watch` send its last status and ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

_Status = health_pb2.HealthCheckResponse
_Context = grpc.aio.ServicerContext[Any, Any]


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # grpc_health has no types
    """Health of some services, all with the same status."""

    def __init__(self, service_names: Sequence[str]) -> None:
        """Makes a service whose status is NOT_SERVING, for some names; "" is the server."""
        self._names = frozenset(service_names)
        self._status = _Status.NOT_SERVING
        self._changed = asyncio.Condition()
        self._ending = False
        self._watches: set[asyncio.Task[Any]] = set()

    async def set_serving(self, serving: bool) -> None:
        """Sets the status of all names to SERVING or NOT_SERVING."""
        async with self._changed:
            self._status = _Status.SERVING if serving else _Status.NOT_SERVING
            self._changed.notify_all()

    async def end_watches(self, timeout_s: float) -> None:
        """Ends each Watch once its last status is sent; waits so long for watchers that do not read."""
        async with self._changed:
            self._ending = True
            self._changed.notify_all()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._watches:
                    await asyncio.wait(tuple(self._watches))

    async def Check(self, request: Any, context: _Context) -> Any:
        """Returns the status of a service."""
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, "the server has no service of this name")
        return _Status(status=self._status)

    async def Watch(self, request: Any, context: _Context) -> AsyncIterator[Any]:
        """Yields the status of a service now and whenever it changes."""
        task = asyncio.current_task()
        assert task is not None
        self._watches.add(task)
        task.add_done_callback(self._watches.discard)
        sent = None
        while True:
            async with self._changed:
                while (status := self._status_of(request.service)) == sent:
                    if self._ending:
                        return
                    await self._changed.wait()
            yield _Status(status=status)
            sent = status

    def _status_of(self, name: str) -> Any:
        return self._status if name in self._names else _Status.SERVICE_UNKNOWN
