"""What both clients know of gRPC: where to connect, with which options, and what a broken call means."""

from __future__ import annotations

from typing import Final

import grpc

from layertap.errors import CancelledError, LayertapError, StatusCode, from_status

DEFAULT_TARGET: Final = "127.0.0.1:50051"

CLOSED_DURING_CALL: Final = "this client was closed during the call; make a new one"

CHANNEL_OPTIONS: Final = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Without it a frozen peer is noticed only after a minute.
    ("grpc.http2.ping_timeout_ms", 10_000),
    # gRPC's own wait between attempts grows to minutes; a restarted server is to be found at once.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.max_send_message_length", -1),
)


def translate(exc: Exception, target: str, timeout_s: float | None, *, resumable: bool = False) -> LayertapError:
    """Returns what happened to a call as one of layertap's own errors.

    A layertap server says with each of its errors whether to retry; where nothing is said, it was not the server who
    spoke. A `resumable` call takes whatever breaks it on the way for a lost connection.
    """
    if not isinstance(exc, grpc.RpcError):
        return CancelledError(CLOSED_DURING_CALL)
    code = StatusCode(exc.code().value[0])
    details: str = exc.details() or code.name
    # grpc-stubs describes metadata as objects; they are pairs.
    trailing: dict[str, str | bytes] = dict(exc.trailing_metadata() or ())  # type: ignore[arg-type]
    pushback = trailing.get("grpc-retry-pushback-ms")
    broken = pushback is None and code in (StatusCode.INTERNAL, StatusCode.UNKNOWN)
    # It has no deadline of its own: this one is a server's that would not wait for its answers to be read.
    if resumable and (broken or code is StatusCode.DEADLINE_EXCEEDED):
        code = StatusCode.UNAVAILABLE
    if code is StatusCode.UNAVAILABLE and pushback is None:
        details = f"no server answers at {target} (start one with layertap-server, or check the target): {details}"
    elif code is StatusCode.DEADLINE_EXCEEDED and timeout_s is not None:
        details = f"no answer from {target} within {timeout_s} s; raise timeout_s or ask for less"
    wait_s = float(pushback) / 1000 if pushback else -1.0
    request_id = trailing.get("x-request-id")
    return from_status(
        code,
        details,
        retry_after_s=wait_s if wait_s >= 0 else None,
        request_id=request_id if isinstance(request_id, str) else None,
    )
