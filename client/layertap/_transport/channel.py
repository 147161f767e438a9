"""How a gRPC channel is made of a `Connection`."""

from __future__ import annotations

from typing import Any, Final

import grpc
import grpc.aio

from layertap._transport import fork, threads
from layertap._transport.settings import RECONNECT_S, Connection
from layertap._version import __version__
from layertap.errors import InvalidArgumentError

_OPTIONS: Final = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Without it a frozen peer is noticed only after a minute.
    ("grpc.http2.ping_timeout_ms", 10_000),
    # gRPC's own wait between attempts grows to minutes; a restarted server is to be found at once.
    ("grpc.initial_reconnect_backoff_ms", int(RECONNECT_S * 1000)),
    # How long one attempt may take, not how long to wait for the next: a busy or distant server needs a second or two.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.max_send_message_length", -1),
    # What is to be repeated is kept until an answer begins; a request larger than this would not be.
    ("grpc.per_rpc_retry_buffer_size", 64 << 20),
)


def open_channel(connection: Connection, *, own: bool = False) -> grpc.Channel:
    """Returns a channel, which connects at its first call.

    Args:
        connection: What it is made of.
        own: Whether it has a connection of its own; others with equal settings share one.

    Raises:
        FailedPreconditionError: if gRPC would not work in this forked process.
        InvalidArgumentError: if a file of TLS cannot be used.
    """
    fork.check()
    connection.check_token()
    if connection.tls is None:
        return grpc.insecure_channel(connection.uri, options=_options(connection, own))
    return grpc.secure_channel(connection.uri, _credentials(connection), options=_options(connection, own))


def open_async_channel(connection: Connection, *, own: bool = False) -> grpc.aio.Channel:
    """Returns a channel for the running event loop; see `open_channel`."""
    fork.check()
    connection.check_token()
    if connection.tls is None:
        return grpc.aio.insecure_channel(connection.uri, options=_options(connection, own))
    return grpc.aio.secure_channel(connection.uri, _credentials(connection), options=_options(connection, own))


def _options(connection: Connection, own: bool) -> list[tuple[str, Any]]:
    options: list[tuple[str, Any]] = [*_OPTIONS, ("grpc.service_config", connection.service_config)]
    options.append(("grpc.primary_user_agent", f"layertap/{__version__}"))
    if threads.are_patched():
        # A thread of gRPC's that waits for answers would stop all others.
        options.append(("SingleThreadedUnaryStream", 1))
    if own:
        options.append(("grpc.use_local_subchannel_pool", 1))
    if connection.is_local:
        options.append(("grpc.enable_http_proxy", 0))
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
