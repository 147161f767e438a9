"""Where a server listens: its address, its certificate and tokens, and how connections are kept.

Whatever can be wrong with them is found when a `Listener` is made, which is before a model is loaded.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import ssl
from collections.abc import Mapping
from typing import Any, Final

import grpc
import grpc.aio

from layertap_server.flags import ConfigError
from layertap_server.rpc.address import check_port, free_socket_file, join_host_port
from layertap_server.rpc.auth import AuthInterceptor, Tokens, authenticate, certificate_name, read_tokens
from layertap_server.rpc.file_reload import ReloadedFiles
from layertap_server.rpc.health import HealthService
from layertap_server.rpc.short_requests import ServerOfShortRequests
from layertap_server.rpc.tls import ServerTLS
from layertap_server.scheduler.call import Hooks

log = logging.getLogger(__name__)

WINDOW_BYTES: Final = (1 << 16) - 1
"""What a caller may send of a message before the server reads it; HTTP/2 begins with this."""

MAX_STREAM_COUNT: Final = 128
"""Calls of one connection at once; more of them wait at the client."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ListenSettings:
    """How a server listens: the settings of the same names.

    Attributes:
        is_unix: Whether the host is `unix:/path` or `unix-abstract:name`.
        is_local: Whether only this host can reach the address.
    """

    host: str
    port: int
    processes: int
    is_unix: bool
    is_local: bool
    tls_cert: str
    tls_key: str
    tls_client_ca: str
    token_file: str
    max_request_bytes: int
    max_concurrent_call_count: int
    max_connection_count: int
    max_connection_age_s: float
    grace_s: float
    keepalive_time_s: float
    keepalive_timeout_s: float

    def address(self, port: int) -> str:
        """Returns the address with this port, as clients use it."""
        return self.host if self.is_unix else join_host_port(self.host, port)


class Listener:
    """The address of a server, checked, with the files of its certificate and tokens read."""

    def __init__(self, settings: ListenSettings) -> None:
        """Reads the files and checks the address.

        Raises:
            ConfigError: if a file cannot be used, or the address cannot be listened on.
        """
        self._settings = settings
        self._tokens = self._read_tokens()
        self._tls = self._read_tls()
        if settings.is_unix:
            free_socket_file(settings.host)
        elif settings.processes == 1:
            check_port(settings.host, settings.port, flag="--port")

    def make_server(self, hooks: Hooks) -> grpc.aio.Server:
        """Returns a server that listens nowhere yet, and refuses calls without a token if there are tokens."""
        options = _options(self._settings)
        if self._tokens is None:
            return grpc.aio.server(options=options)
        if not self._settings.is_local and self._tls is None:
            log.warning("tokens cross the network unencrypted; give --tls-cert and --tls-key")
        return grpc.aio.server(options=options, interceptors=[AuthInterceptor(self._tokens, hooks)])

    def identify(self, authorization: str | None, certificate: Mapping[str, Any], address: str) -> str:
        """Returns the client that a request over HTTP belongs to.

        Args:
            authorization: The header of that name; None: there is none.
            certificate: The client's certificate as Python's `ssl` describes it; empty: it has shown none.
            address: Its address.

        Raises:
            UnauthenticatedError: if there are tokens, and the authorization has none of them.
        """
        if self._tokens is not None:
            return authenticate(self._tokens.get(), authorization)
        return certificate_name(certificate) or address

    @property
    def http_context(self) -> ssl.SSLContext | None:
        """The TLS of an HTTP server; None: plaintext."""
        return None if self._tls is None else self._tls.http_context()

    @property
    def certificate_expires_at(self) -> float | None:
        """When the first of the server's certificates expires, in seconds since the epoch; None: it has none."""
        return None if self._tls is None else self._tls.expires_at

    async def follow_files(self) -> None:
        """Keeps the certificate and the tokens as their files have them, for ever."""
        await asyncio.gather(*(one.follow() for one in (self._tls, self._tokens) if one is not None))

    def bind(self, server: grpc.aio.Server) -> str:
        """Lets a server listen; returns the address for clients.

        Raises:
            ConfigError: if the address cannot be listened on.
        """
        settings = self._settings
        if self._tls is None and not settings.is_local:
            log.warning("nothing is encrypted on %s, which other hosts can reach", settings.host)
        address = settings.address(settings.port)
        if settings.is_unix:
            free_socket_file(settings.host)
        try:
            if self._tls is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, self._tls.credentials())
        except RuntimeError as exc:
            if not settings.is_unix and settings.processes == 1:
                check_port(settings.host, settings.port, flag="--port")
            hint = "the path may be too long" if settings.is_unix else "the reason is unknown; try --port 0"
            raise ConfigError(f"cannot listen on {address}: {hint}") from exc
        return settings.address(port)

    def _read_tokens(self) -> ReloadedFiles[Tokens] | None:
        path = self._settings.token_file
        if not path:
            return None
        try:
            return ReloadedFiles("the token file", [path], lambda: read_tokens(path))
        except (OSError, ValueError) as exc:
            why = exc.strerror or str(exc) if isinstance(exc, OSError) else str(exc)
            raise ConfigError(f"--token-file {path} cannot be used: {why}") from exc

    def _read_tls(self) -> ServerTLS | None:
        settings = self._settings
        if not settings.tls_cert:
            return None
        try:
            return ServerTLS(cert=settings.tls_cert, key=settings.tls_key, client_ca=settings.tls_client_ca)
        except OSError as exc:
            raise ConfigError(f"a file of TLS cannot be read: {exc.filename}: {exc.strerror}") from exc
        except ValueError as exc:
            raise ConfigError(f"TLS cannot be set up: {exc}") from exc


def add_standard_services(server: grpc.aio.Server, *service_names: str) -> HealthService:
    """Adds health and reflection for some services; returns the health service."""
    from grpc_health.v1 import health, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

    requests = ServerOfShortRequests(server)
    service = HealthService(("", *service_names))
    health_pb2_grpc.add_HealthServicer_to_server(service, requests)
    servicer = reflection.aio.ReflectionServicer  # type: ignore[attr-defined]  # exported by other names
    shown = servicer((*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME))
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(shown, requests)
    return service


def _options(settings: ListenSettings) -> list[tuple[str, int]]:
    age_ms, grace_ms = int(settings.max_connection_age_s * 1000), int(settings.grace_s * 1000)
    return [
        *([("grpc.max_connection_age_ms", age_ms), ("grpc.max_connection_age_grace_ms", grace_ms)] if age_ms else []),
        ("grpc.max_receive_message_length", settings.max_request_bytes),
        ("grpc.max_send_message_length", -1),
        # More of one connection wait at the client, where what they send takes none of our memory. What is above the
        # calls that are admitted is for health, and for refusing at once.
        ("grpc.max_concurrent_streams", min(settings.max_concurrent_call_count + 64, MAX_STREAM_COUNT)),
        ("grpc.max_allowed_incoming_connections", settings.max_connection_count),
        # By its own measure of a fast connection gRPC would let a caller send 512 MiB to each call that reads nothing.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
        # Two servers on one port would share its callers in silence; the processes of one server do so on purpose.
        ("grpc.so_reuseport", int(settings.processes > 1)),
        ("grpc.keepalive_time_ms", int(settings.keepalive_time_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(settings.keepalive_timeout_s * 1000)),
        ("grpc.http2.ping_timeout_ms", int(settings.keepalive_timeout_s * 1000)),
        # The SDK pings every 30 s; other clients may ping a little more often.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ]
