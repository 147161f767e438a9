"""Where calls come in and go out: how many at once, what an error becomes, how long an answer may stay unread.

With `service` the only file that knows a gRPC context.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import grpc
import grpc.aio

from layertap.errors import DeadlineExceededError, InternalError, LayertapError, ResourceExhaustedError

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[bytes, bytes]
T = TypeVar("T")

_STATUS: Final = {code.value[0]: code for code in grpc.StatusCode}


class _CallerLeftError(Exception):
    """A message could not be sent, because its call is gone."""


class Gate:
    """What all calls of a server pass through."""

    def __init__(self, *, max_call_count: int, max_request_bytes: int, stall_timeout_s: float) -> None:
        """Takes what bounds all calls together.

        Args:
            max_call_count: How many may be under way at once.
            max_request_bytes: Bytes of their requests, streams aside.
            stall_timeout_s: How long an answer may stay unread, in seconds.
        """
        self._max_request_bytes = max_request_bytes
        self._request_bytes = 0
        self._max_call_count = max_call_count
        self._stall_timeout_s = stall_timeout_s
        self._call_count = 0

    def answered(self, method: Callable[[Any, Context], Awaitable[T]]) -> Callable[[Any, Context], Awaitable[T]]:
        """Counts a call, and turns its errors into a status."""

        async def call(request: Any, context: Context) -> T:
            byte_count = len(request) if isinstance(request, bytes) else 0
            self._call_count += 1
            self._request_bytes += byte_count
            try:
                if self._call_count > self._max_call_count:
                    raise ResourceExhaustedError(
                        f"the server is full: {self._max_call_count} calls are under way; try again later",
                        retry_after_s=0.5,
                    )
                if self._request_bytes > self._max_request_bytes:
                    raise ResourceExhaustedError(
                        f"the server is full: the requests under way have more than {self._max_request_bytes} bytes; "
                        "try again later",
                        retry_after_s=0.5,
                    )
                return await method(request, context)
            except LayertapError as exc:
                error = exc
            except _CallerLeftError as exc:
                raise asyncio.CancelledError from exc  # There is nobody to tell.
            except Exception:
                log.exception("%s failed", method.__name__)
                error = InternalError("the server failed; its log has the reason")
            finally:
                self._call_count -= 1
                self._request_bytes -= byte_count
            # gRPC's own word for "retry in so many milliseconds"; -1 means never.
            wait_ms = -1 if error.retry_after_s is None else int(error.retry_after_s * 1000)
            await context.abort(_STATUS[int(error.code)], error.details, (("grpc-retry-pushback-ms", str(wait_ms)),))

        return call

    async def write(self, context: Context, message: bytes) -> None:
        """Sends one message; waits while the caller does not read, but not for ever."""
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                await context.write(message)
        except TimeoutError as exc:
            raise DeadlineExceededError(
                f"the answer was not read for {self._stall_timeout_s} s; read faster, or ask for less"
            ) from exc
        except Exception as exc:  # gRPC's own; it has no public name.
            raise _CallerLeftError from exc


def expires_at(context: Context) -> float | None:
    """Returns when nobody waits for a call any more, by time.monotonic; None: it has no deadline."""
    remaining = context.time_remaining()
    # grpc-stubs does not know that a call without a deadline has None.
    return None if remaining is None else time.monotonic() + remaining  # type: ignore[redundant-expr]
