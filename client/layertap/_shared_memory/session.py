"""How a client gets shared memory: one ShareMemory call, opened before the first call that can use it, and kept open.

Whatever stands in the way, the client goes on with plain gRPC and says so once. A lease that has ended is renewed at
the next call; one that was refused for a lasting reason is not requested again on the same channel.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any, Final, TypeAlias

import grpc
import grpc.aio

from layertap._protocol.requests import SERVICE
from layertap._protocol.responses import read_whole
from layertap._shared_memory.mapping import Mapping, SharedCall, SharedMemory
from layertap.errors import LayertapError
from layertap.v1 import embedding_pb2 as pb

log = logging.getLogger("layertap")

Metadata: TypeAlias = tuple[tuple[str, str], ...]

_TIMEOUT_S: Final = 10.0
"""How long a server may take to describe its segment."""

_PASSING: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
"""Reasons for which the next call asks again; they say themselves what is wrong."""


class _Lease:
    """What both kinds have in common: what to make of the server's answer."""

    def __init__(self, channel: Any, memory: SharedMemory, *, target: str, metadata: Metadata) -> None:
        self._method = channel.unary_stream(SERVICE + "ShareMemory", None, None)
        self._memory = memory
        self._target = target
        self._metadata = metadata
        self._mapping: Mapping | None = None
        self._refused = not memory.wanted
        self._call: Any = None

    def _accept(self, raw: Any) -> None:
        try:
            if not isinstance(raw, bytes):
                raise OSError("the server ended the lease at once")
            self._mapping = Mapping(read_whole(raw, pb.ShareMemoryResponse), self._memory)
        except (OSError, LayertapError) as exc:
            self._refuse(str(exc))
            self._call.cancel()

    def _fail(self, exc: Any) -> None:
        if exc.code() not in _PASSING:
            self._refuse(exc.details() or exc.code().name)

    def _refuse(self, reason: str) -> None:
        self._refused = True
        log.warning("no shared memory with %s, plain gRPC instead: %s", self._target, reason)

    def _begin(self) -> SharedCall | None:
        return self._mapping.begin() if self._mapping is not None else None


class Lease(_Lease):
    """The memory shared over one channel. Asks the server at the first `begin`."""

    def __init__(self, channel: grpc.Channel, memory: SharedMemory, *, target: str, metadata: Metadata) -> None:
        super().__init__(channel, memory, target=target, metadata=metadata)
        self._lock = threading.Lock()

    def begin(self, timeout_s: float) -> SharedCall | None:
        """Returns what a new call may use, to be ended with it; None: nothing. Asks the server for so long at most."""
        if self._refused:
            return None
        with self._lock:
            if self._call is None or not self._call.is_active():
                self._open(min(timeout_s, _TIMEOUT_S))
            return self._begin()

    def _open(self, timeout_s: float) -> None:
        self._mapping = None
        try:
            self._call = self._method(pb.ShareMemoryRequest().SerializeToString(), metadata=self._metadata)
            # The call has no deadline, only its first answer has.
            late = threading.Timer(timeout_s, self._call.cancel)
            late.start()
            try:
                raw = next(self._call, None)
            finally:
                late.cancel()
        except grpc.RpcError as exc:
            self._fail(exc)
        except ValueError:
            pass  # The client is closed; the call that wants to use the lease says so.
        else:
            self._accept(raw)


class AsyncLease(_Lease):
    """The memory shared over one asyncio channel; `begin` may be awaited by many tasks."""

    def __init__(self, channel: grpc.aio.Channel, memory: SharedMemory, *, target: str, metadata: Metadata) -> None:
        super().__init__(channel, memory, target=target, metadata=metadata)
        self._lock = asyncio.Lock()

    async def begin(self, timeout_s: float) -> SharedCall | None:
        """See `Lease.begin`."""
        if self._refused:
            return None
        async with self._lock:
            if self._call is None or self._call.done():
                await self._open(min(timeout_s, _TIMEOUT_S))
            return self._begin()

    async def _open(self, timeout_s: float) -> None:
        self._mapping = None
        try:
            self._call = self._method(pb.ShareMemoryRequest().SerializeToString(), metadata=self._metadata)
            raw = await asyncio.wait_for(self._call.read(), timeout_s)
        except grpc.RpcError as exc:
            self._fail(exc)
        except (TimeoutError, asyncio.CancelledError) as exc:
            self._call.cancel()
            if isinstance(exc, asyncio.CancelledError):
                raise
        except grpc.aio.UsageError:
            pass  # The client is closed; the call that wants to use the lease says so.
        else:
            self._accept(raw)
