"""Where a server listens: its address, who may connect, how connections are kept, and the standard services.

Knows the config and gRPC, and nothing of what is served.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable

import grpc
import grpc.aio

from layertap_server.config import Config, ConfigError
from layertap_server.rpc import tls
from layertap_server.rpc.auth import AuthInterceptor, read_tokens
from layertap_server.rpc.file_reload import ReloadedFiles
from layertap_server.scheduler.hooks import Hooks

log = logging.getLogger(__name__)


def make_server(config: Config, hooks: Hooks) -> grpc.aio.Server:
    """Returns a server that listens nowhere yet, and lets in only who has a token if there are tokens.

    Args:
        config: The knobs.
        hooks: Is told of who is not let in.

    Raises:
        ConfigError: The file of tokens cannot be used.
    """
    if not config.token_file:
        return grpc.aio.server(options=_options(config))
    if not config.is_local and not config.tls_cert:
        log.warning("tokens cross the network unencrypted; give --tls-cert and --tls-key")
    try:
        found = ReloadedFiles("the token file", [config.token_file], lambda: read_tokens(config.token_file))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"--token-file {config.token_file} cannot be used: {_why(exc)}") from exc
    return grpc.aio.server(options=_options(config), interceptors=[AuthInterceptor(found, hooks)])


def bind(server: grpc.aio.Server, config: Config) -> str:
    """Lets a server listen; returns the address that callers reach it at.

    Raises:
        ConfigError: The address cannot be listened on, or a file of TLS cannot be used.
    """
    address = config.host if _is_unix(config.host) else f"{config.host}:{config.port}"
    secret = _credentials(config)
    _free_socket_file(address)
    try:
        port = server.add_secure_port(address, secret) if secret else server.add_insecure_port(address)
    except RuntimeError as exc:
        hint = "is the path too long?" if _is_unix(address) else "is the port taken? try --port 0"
        raise ConfigError(f"cannot listen on {address}; {hint}") from exc
    return address if _is_unix(address) else f"{config.host}:{port}"


def add_standard_services(server: grpc.aio.Server, service_name: str) -> Callable[[bool], Awaitable[None]]:
    """Adds health and reflection for a service; returns what sets the health."""
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection

    servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]  # grpc-stubs lacks it
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection((service_name, health.SERVICE_NAME, reflection.SERVICE_NAME), server)

    async def set_serving(serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", service_name):
            await servicer.set(name, status)

    return set_serving


def _credentials(config: Config) -> grpc.ServerCredentials | None:
    if not config.tls_cert:
        if not config.is_local:
            log.warning("nothing is encrypted on %s, which others can reach", config.host)
        return None
    try:
        return tls.credentials(cert=config.tls_cert, key=config.tls_key, client_ca=config.tls_client_ca)
    except OSError as exc:
        raise ConfigError(f"a file of TLS cannot be read: {exc.filename}: {exc.strerror}") from exc
    except ValueError as exc:
        raise ConfigError(f"TLS cannot be set up: {exc}") from exc


def _why(exc: Exception) -> str:
    return exc.strerror or str(exc) if isinstance(exc, OSError) else str(exc)


def _options(config: Config) -> list[tuple[str, int]]:
    age_ms, grace_ms = int(config.max_connection_age_s * 1000), int(config.grace_s * 1000)
    return [
        *([("grpc.max_connection_age_ms", age_ms), ("grpc.max_connection_age_grace_ms", grace_ms)] if age_ms else []),
        ("grpc.max_receive_message_length", config.max_request_bytes),
        ("grpc.max_send_message_length", -1),
        # More of one connection wait at the client, where what they send takes none of our memory. What is above the
        # calls that are let in is for health, and for refusing at once.
        ("grpc.max_concurrent_streams", config.max_concurrent_call_count + 64),
        # Two servers on one port would share its callers in silence.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", int(config.keepalive_time_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(config.keepalive_timeout_s * 1000)),
        ("grpc.http2.ping_timeout_ms", int(config.keepalive_timeout_s * 1000)),
        # Ours does every 30 s; others may a little more often.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ]


def _is_unix(address: str) -> bool:
    return address.startswith(("unix:", "unix-abstract:"))


def _free_socket_file(address: str) -> None:
    """Removes the file of a unix socket that a killed server has left.

    gRPC would remove any, also that of a server which still runs, and whose callers would then be lost in silence.

    Raises:
        ConfigError: Somebody listens there, or it is no socket.
    """
    if not address.startswith("unix:"):
        return
    path = address.removeprefix("unix:")
    path = "/" + path.lstrip("/") if path.startswith("//") else path
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise ConfigError(f"--host is {address}, but that file is no socket; choose another path")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(path)
    except FileNotFoundError:
        folder = os.path.dirname(path) or "."
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(f"cannot listen on {address}: {folder} is not a folder that may be written to") from None
    except ConnectionRefusedError:
        os.unlink(path)
    except OSError as exc:
        raise ConfigError(f"cannot listen on {address}: {exc.strerror or exc}") from exc
    else:
        raise ConfigError(f"cannot listen on {address}: another server does; stop it, or choose another path")
