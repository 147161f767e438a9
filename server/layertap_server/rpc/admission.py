"""Where calls come in and go out.

How many at once, what an error becomes, how long an answer may stay unread, and how calls end when the server does.
`Admission.call` knows no protocol, and `Admission.answered` is its use for gRPC: calls of all protocols share the same
limits. With `service` and `auth` the only file that knows a gRPC context. What happens to a call is noted in its
record; see `call_log`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Final, TypeVar

import grpc
import grpc.aio

from layertap.errors import (
    CancelledError,
    DeadlineExceededError,
    InternalError,
    LayertapError,
    ResourceExhaustedError,
    UnavailableError,
)
from layertap_server.observability.call_log import REQUEST_ID, CallLog, Record
from layertap_server.rpc import auth
from layertap_server.scheduler.hooks import Hooks
from layertap_server.types import RETRY_FULL_S, RETRY_STOPPING_S

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[bytes, bytes]
T = TypeVar("T")

_STATUS: Final = {code.value[0]: code for code in grpc.StatusCode}

_NEAR_S: Final = 0.05
"""A caller's clock ends a call a little before ours does: what is cancelled so near to its deadline has met it."""


class CallerLeftError(Exception):
    """A message could not be sent, because its call is gone."""


class Caller:
    """Who is at the other end of a call.

    Attributes:
        record: What is known of the call.
    """

    def __init__(self, context: Context, record: Record, *, stall_timeout_s: float) -> None:
        self.record = record
        self._context = context
        self._stall_timeout_s = stall_timeout_s

    @property
    def client(self) -> str:
        """The client whose share the call uses."""
        return self.record.client

    @property
    def connection(self) -> str:
        """What tells the client's connections apart."""
        return auth.connection_of(self._context, self)

    @property
    def expires_at(self) -> float | None:
        """The deadline of the call, by time.monotonic; None: it has none."""
        remaining = self._context.time_remaining()
        # grpc-stubs does not know that a call without a deadline has None.
        return None if remaining is None else time.monotonic() + remaining  # type: ignore[redundant-expr]

    async def write(self, message: bytes) -> None:
        """Sends one message; waits while the caller does not read, but not for ever."""
        started_at_ns = time.monotonic_ns()
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                await self._context.write(message)
        except TimeoutError as exc:
            self.record.stalled = True
            raise DeadlineExceededError(
                f"the answer was not read for {self._stall_timeout_s} s; read faster, or ask for less"
            ) from exc
        except Exception as exc:  # gRPC's own; it has no public name.
            raise CallerLeftError from exc
        self.record.send.note(started_at_ns, time.monotonic_ns())
        self.record.sent_bytes += len(message)


class AdmittedCall:
    """A call under way, whatever its protocol.

    Attributes:
        record: What is known of it.
        byte_count: The bytes of its request that are held.
    """

    def __init__(self, record: Record, count_bytes: Callable[[int], None]) -> None:
        self.record = record
        self.byte_count = 0
        self._count_bytes = count_bytes

    def add_bytes(self, byte_count: int) -> None:
        """Counts bytes of the request that have come; they are given back when the call ends.

        Raises:
            ResourceExhaustedError: All requests together have too many.
        """
        self.byte_count += byte_count
        self._count_bytes(byte_count)

    def fail(self, error: LayertapError) -> LayertapError:
        """Records the error that the call ends with; returns it with the call's request_id."""
        self.record.fail(error)
        error.request_id = self.record.request_id
        return error


class Admission:
    """What all calls of a server pass through.

    Attributes:
        closed: Whether no more calls are let in; long ones wait for it and end early.
    """

    def __init__(
        self,
        *,
        max_call_count: int,
        max_request_bytes: int,
        stall_timeout_s: float,
        call_log: CallLog,
        hooks: Hooks,
    ) -> None:
        """Sets the bounds of all calls together.

        Args:
            max_call_count: How many may be under way at once.
            max_request_bytes: Bytes of their requests, streams aside.
            stall_timeout_s: How long an answer may stay unread, in seconds.
            call_log: Keeps their records.
            hooks: Called for refusals.
        """
        self._max_request_bytes = max_request_bytes
        self._request_bytes = 0
        self._max_call_count = max_call_count
        self._stall_timeout_s = stall_timeout_s
        self._call_log = call_log
        self._hooks = hooks
        self._calls: dict[asyncio.Task[Any], str] = {}
        self.closed = asyncio.Event()
        self._left = asyncio.Event()
        self._cutting = False

    @property
    def call_count(self) -> int:
        """Calls under way, until the last byte of their answers is handed to gRPC."""
        return len(self._calls)

    def close(self) -> None:
        """Lets no more calls in."""
        self.closed.set()

    async def emptied(self, timeout_s: float) -> bool:
        """Waits until no call is under way, but no longer than that; returns whether it is so."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._calls:
                    self._left.clear()
                    await self._left.wait()
        return not self._calls

    def cut(self) -> None:
        """Ends the calls that are under way with UNAVAILABLE."""
        self._cutting = True
        for task in self._calls:
            task.cancel()

    @contextlib.contextmanager
    def call(
        self,
        name: str,
        *,
        client: str,
        metadata: Mapping[str, str | bytes],
        why_left: Callable[[], LayertapError] = lambda: CancelledError("the caller has left"),
    ) -> Iterator[AdmittedCall]:
        """Counts and records the call of the current task, and converts what is raised inside to an error of the call.

        Args:
            name: What the log and the metrics call it, such as "Embed".
            client: The client that it belongs to.
            metadata: What the caller has sent besides the request.
            why_left: Returns the error to record when the caller no longer waits.

        Raises:
            LayertapError: The call was refused, or has failed. The error has the call's request_id.
            asyncio.CancelledError: The caller has left.
        """
        admitted = AdmittedCall(self._call_log.open(name, client=client, metadata=metadata), self._count_bytes)
        record = admitted.record
        task = asyncio.current_task()
        assert task is not None
        self._calls[task] = client
        task.add_done_callback(self._leave)
        try:
            self._check_places(client)
            yield admitted
        except LayertapError as exc:
            admitted.fail(exc)
            raise
        except (CallerLeftError, asyncio.CancelledError) as exc:
            if not self._cutting or isinstance(exc, CallerLeftError):
                record.fail(why_left())
                raise asyncio.CancelledError from exc
            task.uncancel()
            details = "the server could not finish in time; try another"
            raise admitted.fail(UnavailableError(details, retry_after_s=RETRY_STOPPING_S)) from exc
        except Exception as exc:
            log.exception("%s failed", name, extra={"fields": {"request_id": record.request_id}})
            raise admitted.fail(InternalError("the server failed; its log has the reason")) from exc
        finally:
            self._request_bytes -= admitted.byte_count
            self._call_log.close(record)

    def answered(
        self, name: str, method: Callable[[Any, Caller], Awaitable[T]]
    ) -> Callable[[Any, Context], Awaitable[T]]:
        """Returns a method that counts and records the calls of an RPC, and converts their errors to a status."""

        async def call(request: Any, context: Context) -> T:
            metadata = dict(context.invocation_metadata() or ())
            client = auth.client_of(context)
            try:
                with self.call(name, client=client, metadata=metadata, why_left=lambda: _left(context)) as admitted:
                    # Trailing: metadata sent ahead of an answer would cost small calls a quarter more.
                    context.set_trailing_metadata(((REQUEST_ID, admitted.record.request_id),))
                    if isinstance(request, bytes):
                        admitted.add_bytes(len(request))
                    answer = await method(
                        request, Caller(context, admitted.record, stall_timeout_s=self._stall_timeout_s)
                    )
                    if isinstance(answer, bytes):
                        admitted.record.sent_bytes += len(answer)
                    return answer
            except LayertapError as exc:
                error = exc
            # gRPC's own word for "retry in so many milliseconds"; -1 means never.
            wait_ms = -1 if error.retry_after_s is None else int(error.retry_after_s * 1000)
            trailing = (("grpc-retry-pushback-ms", str(wait_ms)), (REQUEST_ID, error.request_id or ""))
            try:
                await context.abort(_STATUS[int(error.code)], error.details, trailing)
            except grpc.aio.AbortError:
                raise
            except Exception as exc:  # The connection is gone, and gRPC would call that a fault of ours.
                raise asyncio.CancelledError from exc

        return call

    def _check_places(self, client: str) -> None:
        if self.closed.is_set():
            self._hooks.refused("stopping")
            raise UnavailableError(
                "the server is stopping; try another, or again later", retry_after_s=RETRY_STOPPING_S
            )
        if len(self._calls) > self._call_share(client):
            self._hooks.refused("calls")
            raise ResourceExhaustedError(
                f"the server is full: {self._max_call_count} calls are under way; try again later",
                retry_after_s=RETRY_FULL_S,
            )

    def _count_bytes(self, byte_count: int) -> None:
        self._request_bytes += byte_count
        if self._request_bytes > self._max_request_bytes:
            self._hooks.refused("request_bytes")
            raise ResourceExhaustedError(
                f"the server is full: the requests under way have more than {self._max_request_bytes} bytes; "
                "try again later",
                retry_after_s=RETRY_FULL_S,
            )

    def _call_share(self, client: str) -> int:
        """Returns how many calls there may be; the last eighth is kept for clients who have less than an eighth."""
        eighth = self._max_call_count // 8
        if len(self._calls) <= self._max_call_count - eighth:
            return self._max_call_count
        own = sum(one == client for one in self._calls.values())
        return self._max_call_count if own <= max(eighth, 1) else self._max_call_count - eighth

    def _leave(self, task: asyncio.Task[Any]) -> None:
        self._calls.pop(task)
        self._left.set()


def _left(context: Context) -> LayertapError:
    """Returns why a caller no longer waits."""
    remaining = context.time_remaining()
    # grpc-stubs does not know that a call without a deadline has None.
    if remaining is not None and remaining < _NEAR_S:  # type: ignore[redundant-expr]
        return DeadlineExceededError("the caller's deadline has passed")
    return CancelledError("the caller has left")
