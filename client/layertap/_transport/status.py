"""What the end of a call means: gRPC's status as one of layertap's own errors."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Final

import grpc

from layertap._transport.settings import RECONNECT_S, Connection
from layertap.errors import CancelledError, LayertapError, StatusCode, from_status

CLOSED_DURING_CALL: Final = "this client was closed during the call; make a new one"

REQUEST_ID: Final = "x-request-id"
"""The metadata in which the server names a call as its log does."""

_BROKEN: Final = ("Socket closed", "Connection reset", "Broken pipe", "ping timeout", "keepalive")
"""gRPC's words for a connection that breaks under a call; of one that could not be made they name the "last error"."""

_TOO_LARGE: Final = "larger than max"
"""gRPC's words for a message that it does not read."""

_DETAILS_LENGTH: Final = 4096
"""A longer text than any of the server's own is cut."""


def translate(
    exc: Exception,
    connection: Connection,
    timeout_s: float | None,
    *,
    resumable: bool = False,
    closed: bool = False,
) -> LayertapError:
    """Returns what happened to a call as one of layertap's own errors.

    A layertap server says with each of its errors whether to retry; where nothing is said, it was not the server who
    spoke. A `resumable` call takes whatever breaks it on the way for a lost connection. Unless the client has been
    `closed`, the call was not cancelled here: it came to a server that was about to end.
    """
    if not isinstance(exc, grpc.RpcError):
        return CancelledError(CLOSED_DURING_CALL)
    code = StatusCode(exc.code().value[0])
    details = (exc.details() or code.name)[:_DETAILS_LENGTH]
    # Not by `dict`, which fails on older gRPC: its Metadata has `keys` but yields pairs.
    ended: Iterable[Any] = exc.trailing_metadata() or ()
    trailing: dict[str, Any] = {name: value for name, value in ended}
    pushback = trailing.get("grpc-retry-pushback-ms")
    broken = pushback is None and code in (StatusCode.INTERNAL, StatusCode.UNKNOWN)
    # It has no deadline of its own: this one is a server's that would not wait for its answers to be read.
    if pushback is None and code is StatusCode.CANCELLED:
        if closed:
            return CancelledError(CLOSED_DURING_CALL)
        code = StatusCode.UNAVAILABLE
    if resumable and (broken or code is StatusCode.DEADLINE_EXCEEDED):
        code = StatusCode.UNAVAILABLE
    # Only a server that is none of layertap's sends anything but a number.
    milliseconds = int(pushback) if isinstance(pushback, str) and pushback.isascii() and pushback.isdigit() else None
    retry_after_s = None if milliseconds is None else milliseconds / 1000
    if code is StatusCode.UNAVAILABLE and pushback is None:
        if "last error" not in details and any(words in details for words in _BROKEN):
            retry_after_s = RECONNECT_S
            details = f"the connection to {connection.target} broke; repeat the call: {details}"
        else:
            details = _unreachable(details, connection)
    elif code is StatusCode.DEADLINE_EXCEEDED and timeout_s is not None:
        details = f"no answer from {connection.target} within {timeout_s} s; raise timeout_s or ask for less"
    elif code is StatusCode.UNAUTHENTICATED:
        hint = "renew" if connection.token else "pass"
        details = f"{details} ({hint} it with token=… or LAYERTAP_TOKEN)"
    elif code is StatusCode.RESOURCE_EXHAUSTED and pushback is None and _TOO_LARGE in details:
        details = f"a request or an answer is too large for one message; send fewer or shorter texts: {details}"
    return from_status(code, details, retry_after_s=retry_after_s, request_id=trailing.get(REQUEST_ID))


def _unreachable(details: str, connection: Connection) -> str:
    """Returns why a connection failed. For what goes wrong in TLS gRPC has no codes, only its words."""
    target, tls = connection.target, connection.tls
    if "CERTIFICATE_VERIFY_FAILED" in details and "expired" in details:
        hint = f"the certificate of {target} has expired; its operator must renew it"
    elif "CERTIFICATE_VERIFY_FAILED" in details:
        hint = (
            f"the certificate of {target} is signed by an authority that is not trusted; pass tls=TLS(ca=…) or "
            "LAYERTAP_TLS_CA with the certificate of that authority"
        )
    elif "Hostname Verification" in details:
        hint = (
            f"the certificate of {target} is for another name; use a name that it has as the target, or pass "
            "tls=TLS(server_name=…)"
        )
    elif "WRONG_VERSION_NUMBER" in details:
        hint = f"{target} speaks no TLS; leave tls and LAYERTAP_TLS_… out, or check the target"
    elif "security handshaker" in details:
        hint = "what tls names is no certificate in PEM and its key; check tls.ca, tls.cert and tls.key"
    elif (proxy := connection.proxy_variable(os.environ)) is not None:
        hint = (
            f"{target} cannot be reached by way of the proxy that the variable {proxy} names; add its host to no_proxy "
            "to connect without it"
        )
    elif "last error" not in details or "Connection refused" in details or "No such file" in details:
        hint = f"no server answers at {target} (start one with layertap-server, or check the target)"
    elif "timed out" in details:
        hint = f"{target} takes connections and does not answer; it is stopped or overloaded, or no layertap server"
    elif tls is None:
        hint = (
            f"{target} ends the connection at once; repeat the call, or if it speaks TLS pass tls=True or tls=TLS(ca=…)"
        )
    elif tls.cert is None:
        hint = (
            f"{target} ends the connection at once; if it asks clients for a certificate, pass tls=TLS(cert=…, key=…)"
        )
    else:
        hint = f"{target} does not take the certificate in tls.cert; is it expired, or signed by another authority?"
    return f"{hint}: {details}"
