"""The admission of calls: how many at once, what an error becomes, and how calls end when the server does.

A call is admitted by its headers: nothing of its request is read before. It belongs to a client: by the name of its
token, else by its certificate's, else by its address. `Admission.call` knows no protocol, and `Admission.answered` is
its use for gRPC: calls of all protocols share the same limits. Each call writes its record; see `call_log`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
import urllib.parse
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Final, TypeVar

import grpc
import grpc.aio

from layertap.errors import InternalError, LayertapError, ResourceExhaustedError, UnavailableError, counted
from layertap_server.observability.call_log import REQUEST_ID, CallLog
from layertap_server.rpc import auth
from layertap_server.rpc.caller import (
    AdmittedCall,
    Caller,
    CallerLeftError,
    Context,
    Deadlines,
    Shared,
)
from layertap_server.rpc.stream_memory import StreamMemory
from layertap_server.scheduler.call import Hooks
from layertap_server.scheduler.fairness import Reads, RequestMemory
from layertap_server.types import RETRY_FULL_S, RETRY_STOPPING_S

log = logging.getLogger(__name__)

T = TypeVar("T")

_STATUS: Final = {code.value[0]: code for code in grpc.StatusCode}

_LEAST_IDLE_S: Final = 0.2
"""How long a call must have been idle before another may get its place: a message that is on its way takes less."""


class Admission:
    """Admits the calls of a server.

    Attributes:
        closed: Set once no more calls are admitted; long ones wait for it and end early.
    """

    def __init__(
        self,
        *,
        max_call_count: int,
        max_request_bytes: int,
        stall_timeout_s: float,
        idle_timeout_s: float,
        by_certificate: bool,
        call_log: CallLog,
        hooks: Hooks,
    ) -> None:
        """Sets the bounds of all calls together.

        Args:
            max_call_count: How many may be under way at once.
            max_request_bytes: Bytes that their requests may take.
            stall_timeout_s: How long a request may take to come, and an answer may stay unread, in seconds.
            idle_timeout_s: How long a stream may be idle, in seconds.
            by_certificate: Whether callers over gRPC may have shown a certificate, by whose name they go.
            call_log: Keeps their records.
            hooks: Called for refusals.
        """
        self._shared = Shared(
            memory=RequestMemory(max_request_bytes, hooks),
            streams=StreamMemory(max_request_bytes),
            deadlines=Deadlines(),
            reads=Reads(),
            stall_timeout_s=stall_timeout_s,
            idle_timeout_s=idle_timeout_s,
        )
        self._by_certificate = by_certificate
        self._max_call_count = max_call_count
        self._free_count = max_call_count - max_call_count // 8
        self._call_log = call_log
        self._hooks = hooks
        self._calls: dict[AdmittedCall, None] = {}
        self.closed = asyncio.Event()
        self._left = asyncio.Event()

    @property
    def call_count(self) -> int:
        """Calls under way, until the last byte of their answers is handed to gRPC."""
        return len(self._calls)

    def close(self) -> None:
        """Admits no more calls."""
        self.closed.set()

    async def emptied(self, timeout_s: float) -> bool:
        """Waits until no call is under way, but not longer; returns whether none is."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._calls:
                    self._left.clear()
                    await self._left.wait()
        return not self._calls

    def cut(self) -> None:
        """Ends the calls that are under way with UNAVAILABLE."""
        for call in self._calls:
            call.end(
                UnavailableError("the server could not finish in time; try another", retry_after_s=RETRY_STOPPING_S)
            )

    @contextlib.contextmanager
    def call(
        self, name: str, *, client: str, connection: str, metadata: Mapping[str, str | bytes]
    ) -> Iterator[AdmittedCall]:
        """Counts and records the call of the current task, and converts what is raised inside to an error of the call.

        Args:
            name: What the log and the metrics call it, such as "Embed".
            client: The client that it belongs to.
            connection: What tells the client's connections apart.
            metadata: What the caller has sent besides the request.

        Raises:
            LayertapError: if the call was refused, or has failed. The error has the call's request_id.
            asyncio.CancelledError: The caller has left.
        """
        task = _current_task()
        record = self._call_log.open(name, client=client, metadata=metadata)
        call = AdmittedCall(record, task, self._shared, connection=connection)
        self._calls[call] = None
        task.add_done_callback(functools.partial(self._leave, call))
        try:
            self._check_places(client)
            yield call
        except LayertapError as exc:
            call.fail(exc)
            raise
        except (Exception, asyncio.CancelledError) as exc:
            raise self._error_of(call, exc) from exc
        finally:
            self._close(call)

    def answered(
        self, name: str, method: Callable[[bytes, Caller], Awaitable[T]]
    ) -> Callable[[Any, Context], Awaitable[T]]:
        """Returns a method that counts and records the calls of an RPC, and converts their errors to a status.

        For gRPC it is the method of an RPC whose request is a stream: of others gRPC would read the request before it
        asks. It gets the first message and the caller.
        """
        shared = self._shared

        async def answer(_: Any, context: Context) -> T:
            peer = context.peer()
            client = client_of(context, peer, by_certificate=self._by_certificate)
            record = self._call_log.open(name, client=client, metadata=dict(context.invocation_metadata() or ()))
            caller = Caller(context, peer, record, _current_task(), shared)
            self._calls[caller] = None
            # Called with the context. grpc-stubs wants that argument to have a name.
            context.add_done_callback(functools.partial(self._leave, caller))  # type: ignore[arg-type]
            # Trailing: metadata sent ahead of an answer would cost small calls a quarter more.
            context.set_trailing_metadata(((REQUEST_ID, record.request_id),))
            try:
                self._check_places(client)
                answered = await method(await caller.read_first(), caller)
                if isinstance(answered, bytes):
                    record.sent_bytes += len(answered)
                    shared.deadlines.add(caller, time.monotonic() + shared.stall_timeout_s)  # By then it must be sent.
                return answered
            except (Exception, asyncio.CancelledError) as exc:
                error = self._error_of(caller, exc)
            finally:
                self._close(caller)
            # gRPC's own word for "retry in so many milliseconds"; -1 means never.
            wait_ms = -1 if error.retry_after_s is None else int(error.retry_after_s * 1000)
            trailing = (("grpc-retry-pushback-ms", str(wait_ms)), (REQUEST_ID, record.request_id))
            try:
                await context.abort(_STATUS[int(error.code)], error.details, trailing)
            except grpc.aio.AbortError:
                raise
            except Exception as exc:  # The connection is gone, and gRPC would call that a fault of ours.
                raise asyncio.CancelledError from exc

        return answer

    def _error_of(self, call: AdmittedCall, raised: Exception | asyncio.CancelledError) -> LayertapError:
        """Returns the error that a call ends with, and records it.

        Raises:
            asyncio.CancelledError: The caller has left.
        """
        if isinstance(raised, LayertapError):
            return call.fail(raised)
        if isinstance(raised, CallerLeftError) or (isinstance(raised, asyncio.CancelledError) and call.ending is None):
            call.record.fail(call.why_left())
            raise asyncio.CancelledError from raised
        if call.ending is not None and isinstance(raised, asyncio.CancelledError):
            _current_task().uncancel()
            return call.fail(call.ending)
        log.error(
            "%s failed", call.record.method, exc_info=raised, extra={"fields": {"request_id": call.record.request_id}}
        )
        return call.fail(InternalError("the server failed; its log has the reason"))

    def _close(self, call: AdmittedCall) -> None:
        call.close()
        self._call_log.close(call.record)

    def _check_places(self, client: str) -> None:
        if self.closed.is_set():
            self._hooks.refused("stopping")
            raise UnavailableError(
                "the server is stopping; try another, or again later", retry_after_s=RETRY_STOPPING_S
            )
        if len(self._calls) > self._free_count and len(self._calls) > self._call_share(client) and not self._end_idle():
            self._hooks.refused("calls")
            raise ResourceExhaustedError(
                f"the server is full with {counted(self._max_call_count, 'call')} under way; try again later",
                retry_after_s=RETRY_FULL_S,
            )

    def _end_idle(self) -> bool:
        """Ends the call that is idle longest, of the client with most idle ones; returns whether there was one."""
        idle = [call for call in self._calls if call.idle_s >= _LEAST_IDLE_S]
        if not idle:
            return False
        counts = Counter(call.client for call in idle)
        call = max(idle, key=lambda one: (counts[one.client], one.idle_s))
        call.end(
            UnavailableError(
                "the call was idle while the server was full; try again, with the whole request at once",
                retry_after_s=RETRY_FULL_S,
            )
        )
        del self._calls[call]
        return True

    def _call_share(self, client: str) -> int:
        """Returns how many calls there may be; the last eighth is kept for clients who have less than an eighth."""
        own = sum(call.client == client for call in self._calls)
        is_light = own <= max(self._max_call_count - self._free_count, 1)
        return self._max_call_count if is_light else self._free_count

    def _leave(self, call: AdmittedCall, _: object) -> None:
        self._calls.pop(call, None)
        self._shared.deadlines.remove(call)
        self._left.set()


def _current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


def client_of(context: grpc.aio.ServicerContext[Any, Any], peer: str, *, by_certificate: bool) -> str:
    """Returns the client that a call of this peer belongs to."""
    if (name := auth.token_name.get()) is not None:
        return name
    if by_certificate:
        for key in ("x509_common_name", "x509_subject_alternative_name"):
            for value in context.auth_context().get(key, ()):
                if name := value.decode(errors="replace").strip():
                    return name
    return _host_of(peer)


@functools.lru_cache(1024)
def _host_of(peer: str) -> str:
    """Returns the address of a peer as gRPC writes it, without its port; "unix" for all of unix sockets."""
    scheme, _, address = urllib.parse.unquote(peer).partition(":")
    return scheme if scheme.startswith("unix") else address.rpartition(":")[0]
