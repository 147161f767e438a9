"""The other end of a call over gRPC: the messages that it sends and reads, its deadline, and why it has left."""

from __future__ import annotations

import asyncio
import time
from typing import Final

import grpc.aio

from layertap.errors import CancelledError, DeadlineExceededError, InvalidArgumentError, LayertapError, UnavailableError
from layertap_server.observability.call_log import Record
from layertap_server.rpc import auth
from layertap_server.rpc.admitted_call import AdmittedCall
from layertap_server.types import RETRY_ELSEWHERE_S

Context = grpc.aio.ServicerContext[bytes, bytes]

_NEAR_S: Final = 0.05
"""A caller's clock ends a call a little before ours does: what is cancelled so near to its deadline has met it."""


class CallerLeftError(Exception):
    """A message could not be sent, because its call is gone."""


class Caller:
    """The other end of a call over gRPC.

    Attributes:
        call: The call.
        record: Its record.
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
        self.call.set_idle(self._stall_timeout_s, self._late_error)
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
            self.call.set_idle(self._idle_timeout_s, self._idle_error)

    def _late_error(self) -> LayertapError:
        return DeadlineExceededError(
            f"the request did not come whole within {self._stall_timeout_s:g} s; send it faster, or in parts"
        )

    def _idle_error(self) -> LayertapError:
        return UnavailableError(
            f"the stream was idle for {self._idle_timeout_s:g} s; open it again when there is more to send",
            retry_after_s=RETRY_ELSEWHERE_S,
        )

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


def why_left(context: Context) -> LayertapError:
    """Returns why a caller no longer waits."""
    remaining = context.time_remaining()
    # grpc-stubs does not know that a call without a deadline has None.
    if remaining is not None and remaining < _NEAR_S:  # type: ignore[redundant-expr]
        return DeadlineExceededError("the caller's deadline has passed")
    return CancelledError("the caller has left")
