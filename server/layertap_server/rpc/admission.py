"""Where calls come in and go out.

How many at once, what an error becomes, how long a request may take to come and an answer may stay unread, and how
calls end when the server does. A call is admitted by its headers: nothing of its request is read before.
`Admission.call` knows no protocol, and `Admission.answered` is its use for gRPC: calls of all protocols share the same
limits. With `service` and `auth` the only file that knows a gRPC context. What happens to a call is noted in its
record; see `call_log`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Final, TypeVar

import grpc
import grpc.aio

from layertap.errors import (
    CancelledError,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    LayertapError,
    ResourceExhaustedError,
    UnavailableError,
)
from layertap_server.observability.call_log import REQUEST_ID, CallLog, Record
from layertap_server.rpc import auth
from layertap_server.rpc.admitted_call import AdmittedCall, RequestMemory
from layertap_server.scheduler.hooks import Hooks
from layertap_server.types import RETRY_ELSEWHERE_S, RETRY_FULL_S, RETRY_STOPPING_S

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[bytes, bytes]
T = TypeVar("T")

_STATUS: Final = {code.value[0]: code for code in grpc.StatusCode}

_NEAR_S: Final = 0.05
"""A caller's clock ends a call a little before ours does: what is cancelled so near to its deadline has met it."""

_LEAST_IDLE_S: Final = 0.2
"""How long a call must have been idle before another may get its place: a message that is on its way takes less."""


class CallerLeftError(Exception):
    """A message could not be sent, because its call is gone."""


class Caller:
    """Who is at the other end of a call.

    Attributes:
        call: The call.
        record: What is known of it.
    """

    def __init__(self, context: Context, call: AdmittedCall, *, stall_timeout_s: float, idle_timeout_s: float) -> None:
        self.call = call
        self.record: Record = call.record
        self._context = context
        self._stall_timeout_s = stall_timeout_s
        self._idle_timeout_s = idle_timeout_s

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

    async def read_first(self) -> bytes:
        """Returns the first message, and counts its bytes until the call ends.

        Raises:
            InvalidArgumentError: if there is none.
            ResourceExhaustedError: if the requests of all calls would have too many bytes.
        """
        late = DeadlineExceededError(
            f"the request did not come whole within {self._stall_timeout_s:g} s; send it faster, or in parts"
        )
        self.call.set_idle(self._stall_timeout_s, late)
        message = await self.read()
        self.call.set_busy()
        if message is None:
            raise InvalidArgumentError("the first message is missing; send the request, or of EmbedStream the options")
        self.call.add_bytes(len(message))
        return message

    async def read(self) -> bytes | None:
        """Returns the next message; None: there is none."""
        message = await self._context.read()
        # grpc-stubs does not know that it may be EOF.
        return message if isinstance(message, bytes) else None  # type: ignore[redundant-expr]

    def set_idle(self, idle: bool) -> None:
        """Notes whether a stream waits for its caller and owes no answer."""
        if not idle:
            self.call.set_busy()
        elif not self.call.is_idle:
            error = UnavailableError(
                f"the stream was idle for {self._idle_timeout_s:g} s; open it again when there is more to send",
                retry_after_s=RETRY_ELSEWHERE_S,
            )
            self.call.set_idle(self._idle_timeout_s, error)

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
        idle_timeout_s: float,
        call_log: CallLog,
        hooks: Hooks,
    ) -> None:
        """Sets the bounds of all calls together.

        Args:
            max_call_count: How many may be under way at once.
            max_request_bytes: Bytes that their requests may take.
            stall_timeout_s: How long a request may take to come, and an answer may stay unread, in seconds.
            idle_timeout_s: How long a stream may be idle, in seconds.
            call_log: Keeps their records.
            hooks: Called for refusals.
        """
        self._memory = RequestMemory(max_request_bytes, hooks)
        self._max_call_count = max_call_count
        self._stall_timeout_s = stall_timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._call_log = call_log
        self._hooks = hooks
        self._calls: dict[asyncio.Task[Any], AdmittedCall] = {}
        self.closed = asyncio.Event()
        self._left = asyncio.Event()

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
        for call in self._calls.values():
            call.end(
                UnavailableError("the server could not finish in time; try another", retry_after_s=RETRY_STOPPING_S)
            )

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
            LayertapError: if the call was refused, or has failed. The error has the call's request_id.
            asyncio.CancelledError: The caller has left.
        """
        task = asyncio.current_task()
        assert task is not None
        record = self._call_log.open(name, client=client, metadata=metadata)
        call = AdmittedCall(record, task, self._memory)
        self._calls[task] = call
        task.add_done_callback(self._leave)
        try:
            self._check_places(client)
            yield call
        except LayertapError as exc:
            call.fail(exc)
            raise
        except (CallerLeftError, asyncio.CancelledError) as exc:
            if call.ending is None or isinstance(exc, CallerLeftError):
                record.fail(why_left())
                raise asyncio.CancelledError from exc
            task.uncancel()
            raise call.fail(call.ending) from exc
        except Exception as exc:
            log.exception("%s failed", name, extra={"fields": {"request_id": record.request_id}})
            raise call.fail(InternalError("the server failed; its log has the reason")) from exc
        finally:
            call.close()
            self._call_log.close(record)

    def answered(
        self, name: str, method: Callable[[bytes, Caller], Awaitable[T]]
    ) -> Callable[[Any, Context], Awaitable[T]]:
        """Returns a method that counts and records the calls of an RPC, and converts their errors to a status.

        For gRPC it is the method of an RPC whose request is a stream: of others gRPC would read the request before it
        asks. It gets the first message and the caller.
        """

        async def answer(_: Any, context: Context) -> T:
            metadata = dict(context.invocation_metadata() or ())
            client = auth.client_of(context)
            try:
                with self.call(name, client=client, metadata=metadata, why_left=lambda: _left(context)) as call:
                    # Trailing: metadata sent ahead of an answer would cost small calls a quarter more.
                    context.set_trailing_metadata(((REQUEST_ID, call.record.request_id),))
                    caller = Caller(
                        context, call, stall_timeout_s=self._stall_timeout_s, idle_timeout_s=self._idle_timeout_s
                    )
                    answered = await method(await caller.read_first(), caller)
                    if isinstance(answered, bytes):
                        call.record.sent_bytes += len(answered)
                    return answered
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

        return answer

    def _check_places(self, client: str) -> None:
        if self.closed.is_set():
            self._hooks.refused("stopping")
            raise UnavailableError(
                "the server is stopping; try another, or again later", retry_after_s=RETRY_STOPPING_S
            )
        if len(self._calls) > self._call_share(client) and not self._end_idle():
            self._hooks.refused("calls")
            raise ResourceExhaustedError(
                f"the server is full: {self._max_call_count} calls are under way; try again later",
                retry_after_s=RETRY_FULL_S,
            )

    def _end_idle(self) -> bool:
        """Ends the call that is idle longest, of the client with most idle ones; returns whether there was one."""
        idle = {task: call for task, call in self._calls.items() if call.idle_s >= _LEAST_IDLE_S}
        if not idle:
            return False
        counts = Counter(call.client for call in idle.values())
        task, call = max(idle.items(), key=lambda one: (counts[one[1].client], one[1].idle_s))
        call.end(
            UnavailableError(
                "the call was idle while the server was full; try again, with the whole request at once",
                retry_after_s=RETRY_FULL_S,
            )
        )
        del self._calls[task]
        return True

    def _call_share(self, client: str) -> int:
        """Returns how many calls there may be; the last eighth is kept for clients who have less than an eighth."""
        eighth = self._max_call_count // 8
        if len(self._calls) <= self._max_call_count - eighth:
            return self._max_call_count
        own = sum(call.client == client for call in self._calls.values())
        return self._max_call_count if own <= max(eighth, 1) else self._max_call_count - eighth

    def _leave(self, task: asyncio.Task[Any]) -> None:
        self._calls.pop(task, None)
        self._left.set()


def _left(context: Context) -> LayertapError:
    """Returns why a caller no longer waits."""
    remaining = context.time_remaining()
    # grpc-stubs does not know that a call without a deadline has None.
    if remaining is not None and remaining < _NEAR_S:  # type: ignore[redundant-expr]
        return DeadlineExceededError("the caller's deadline has passed")
    return CancelledError("the caller has left")
