"""What both clients know of gRPC: how a channel is made of a `Connection`, and what a broken call means."""

from __future__ import annotations

from typing import Any, Final

import grpc
import grpc.aio

from layertap._transport import fork
from layertap._transport.settings import Connection
from layertap.errors import CancelledError, InvalidArgumentError, LayertapError, StatusCode, from_status

CLOSED_DURING_CALL: Final = "this client was closed during the call; make a new one"

_OPTIONS: Final = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Without it a frozen peer is noticed only after a minute.
    ("grpc.http2.ping_timeout_ms", 10_000),
    # gRPC's own wait between attempts grows to minutes; a restarted server is to be found at once.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.max_send_message_length", -1),
    # What is to be repeated is kept until an answer begins; a request larger than this would not be.
    ("grpc.per_rpc_retry_buffer_size", 64 << 20),
)


def open_channel(connection: Connection) -> grpc.Channel:
    """Returns a channel, which connects at its first call.

    Raises:
        FailedPreconditionError: gRPC would not work in this forked process.
        InvalidArgumentError: A file of TLS cannot be used.
    """
    fork.check()
    if connection.tls is None:
        return grpc.insecure_channel(connection.uri, options=_options(connection))
    return grpc.secure_channel(connection.uri, _credentials(connection), options=_options(connection))


def open_async_channel(connection: Connection) -> grpc.aio.Channel:
    """Returns a channel for the running event loop; see `open_channel`."""
    fork.check()
    if connection.tls is None:
        return grpc.aio.insecure_channel(connection.uri, options=_options(connection))
    return grpc.aio.secure_channel(connection.uri, _credentials(connection), options=_options(connection))


def _options(connection: Connection) -> list[tuple[str, Any]]:
    options: list[tuple[str, Any]] = [*_OPTIONS, ("grpc.service_config", connection.service_config)]
    if connection.tls is not None and connection.tls.server_name:
        options.append(("grpc.ssl_target_name_override", connection.tls.server_name))
    given = {name for name, _ in connection.options}
    return [one for one in options if one[0] not in given] + list(connection.options)


def _credentials(connection: Connection) -> grpc.ChannelCredentials:
    assert connection.tls is not None
    ca, key, cert = connection.tls.read()
    for name, value in (("ca", ca), ("key", key), ("cert", cert)):
        if value is not None and b"-----BEGIN " not in value:
            raise InvalidArgumentError(f"tls.{name} is no PEM; pass the path of a file that begins with -----BEGIN")
    return grpc.ssl_channel_credentials(ca, key, cert)


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
    `closed`, nobody here has cancelled the call: it came to a server that was about to end.
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
    if pushback is None and code is StatusCode.CANCELLED and not closed:
        code = StatusCode.UNAVAILABLE
    if resumable and (broken or code is StatusCode.DEADLINE_EXCEEDED):
        code = StatusCode.UNAVAILABLE
    if code is StatusCode.UNAVAILABLE and pushback is None:
        details = _unreachable(details, connection)
    elif code is StatusCode.DEADLINE_EXCEEDED and timeout_s is not None:
        details = f"no answer from {connection.target} within {timeout_s} s; raise timeout_s or ask for less"
    elif code is StatusCode.UNAUTHENTICATED:
        hint = "renew" if connection.token else "pass"
        details = f"{details} ({hint} it with token=… or LAYERTAP_TOKEN)"
    wait_s = float(pushback) / 1000 if pushback else -1.0
    request_id = trailing.get("x-request-id")
    return from_status(
        code,
        details,
        retry_after_s=wait_s if wait_s >= 0 else None,
        request_id=request_id if isinstance(request_id, str) else None,
    )


def _unreachable(details: str, connection: Connection) -> str:
    """Returns why a connection failed. For what goes wrong in TLS gRPC has no codes, only its words."""
    target, tls = connection.target, connection.tls
    if "CERTIFICATE_VERIFY_FAILED" in details and "expired" in details:
        hint = f"the certificate of {target} has expired; its operator must renew it"
    elif "CERTIFICATE_VERIFY_FAILED" in details:
        hint = (
            f"the certificate of {target} is signed by nobody who is trusted; pass tls=TLS(ca=…) or LAYERTAP_TLS_CA "
            "with the certificate of who signed it"
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
    elif "last error" not in details or "Connection refused" in details:
        hint = f"no server answers at {target} (start one with layertap-server, or check the target)"
    elif tls is None:
        hint = f"{target} ends the connection at once; if it speaks TLS, pass tls=True or tls=TLS(ca=…)"
    elif tls.cert is None:
        hint = (
            f"{target} ends the connection at once; if it asks clients for a certificate, pass tls=TLS(cert=…, key=…)"
        )
    else:
        hint = f"{target} does not take the certificate in tls.cert; is it expired, or signed by another authority?"
    return f"{hint}: {details}"
