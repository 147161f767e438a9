"""The server's side of TLS: its certificate, its key, and the authorities of clients, read again when the files change.

New files are checked here, since gRPC would not report a certificate that it cannot use. A certificate that has expired
or is not yet valid does not replace a valid one. Each handshake uses what is in force then.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import ssl
import time
from typing import Any, Final

import grpc

from layertap_server.rpc.certificates import Validity, validities
from layertap_server.rpc.file_reload import ReloadedFiles

log = logging.getLogger(__name__)

_WARN_INTERVAL_S: Final = 86_400.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Certificate:
    """What the files say.

    Attributes:
        context: The same for Python's `ssl`.
        configuration: The same for gRPC.
        first_to_expire: The dates of the certificate that expires first.
    """

    context: ssl.SSLContext
    configuration: grpc.ServerCertificateConfiguration
    first_to_expire: Validity


class ServerTLS:
    """The certificate of a server, for gRPC and for HTTP; the log warns once a day of one that will soon expire."""

    def __init__(self, *, cert: str, key: str, client_ca: str) -> None:
        """Reads the files.

        Args:
            cert: The path of the certificate in PEM, with those between it and the root.
            key: The path of its key in PEM.
            client_ca: The path of the certificates in PEM that sign those of clients; empty: clients need none.

        Raises:
            OSError: if a file cannot be read.
            ValueError: if a file is not what it should be, or a certificate is not valid now.
        """
        paths = [path for path in (cert, key, client_ca) if path]
        self._files = ReloadedFiles("the certificate", paths, lambda: _read(cert, key, client_ca))
        self._asks_clients = bool(client_ca)
        self._warned: _Certificate | None = None
        self._warn_at = 0.0

    @property
    def expires_at(self) -> float:
        """When the first of the server's certificates expires, in seconds since the epoch."""
        return self._files.get().first_to_expire.end.timestamp()

    def credentials(self) -> grpc.ServerCredentials:
        """Returns what a gRPC server listens with."""
        given = self._files.get()

        def changed() -> grpc.ServerCertificateConfiguration | None:
            # gRPC asks before each handshake, one at a time for each port.
            nonlocal given
            before, given = given, self._files.get()
            return None if given is before else given.configuration

        return grpc.dynamic_ssl_server_credentials(
            given.configuration,
            changed,  # type: ignore[arg-type]  # grpc-stubs does not know that None means no change
            require_client_authentication=self._asks_clients,
        )

    def http_context(self) -> ssl.SSLContext:
        """Returns what an HTTP server listens with."""
        context = _ReloadedContext(ssl.PROTOCOL_TLS_SERVER)
        context.files = self._files
        return context

    async def follow(self) -> None:
        """Keeps the certificate as the files have it, for ever."""
        self._warn(self._files.get())
        await self._files.follow(self._warn)

    def _warn(self, found: _Certificate) -> None:
        if found is not self._warned or time.monotonic() >= self._warn_at:
            self._warned, self._warn_at = found, time.monotonic() + _WARN_INTERVAL_S
            if warning := found.first_to_expire.warning(_now()):
                log.warning("a certificate of --tls-cert %s", warning)


class _ReloadedContext(ssl.SSLContext):
    """What an HTTP server listens with: each handshake uses the certificate that is then in force."""

    files: ReloadedFiles[_Certificate]

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        """See `ssl.SSLContext`."""
        return self.files.get().context.wrap_bio(*args, **options)


def _read(cert: str, key: str, client_ca: str) -> _Certificate:
    chain, secret = _pem(cert), _pem(key)
    roots = _pem(client_ca) if client_ca else None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # An empty password, or OpenSSL would ask for one at the terminal.
        context.load_cert_chain(cert, key, password="")
    except (ssl.SSLError, ValueError) as exc:
        raise ValueError(
            f"--tls-cert and --tls-key are no certificate in PEM and its unencrypted key ({_why(exc)})"
        ) from exc
    if roots is not None:
        try:
            context.load_verify_locations(cadata=roots.decode("ascii"))
        except (ssl.SSLError, ValueError) as exc:
            raise ValueError(f"--tls-client-ca has no certificates in PEM ({_why(exc)})") from exc
        context.verify_mode = ssl.CERT_REQUIRED
    if (_pem(cert), _pem(key)) != (chain, secret):
        raise ValueError("they are being written, and are read again once they are not")
    own = validities(chain)
    if not own:
        raise ValueError("--tls-cert has no certificate in PEM")
    if faults := [fault for one in own if (fault := one.fault(_now()))]:
        raise ValueError(f"a certificate of --tls-cert {faults[0]}")
    # One that is out of date among several is usual: authorities overlap while they are replaced.
    others = [one.fault(_now()) for one in validities(roots or b"")]
    if others and all(others):
        raise ValueError(f"the certificate of --tls-client-ca {others[0]}")
    return _Certificate(
        context=context,
        configuration=grpc.ssl_server_certificate_configuration([(secret, chain)], root_certificates=roots),
        first_to_expire=min(own, key=lambda one: one.end),
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _pem(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _why(exc: ValueError | ssl.SSLError) -> str:
    return (exc.reason if isinstance(exc, ssl.SSLError) else "") or type(exc).__name__
