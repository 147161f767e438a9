"""The server's side of TLS: its certificate, its key, and the authorities of clients, read again when the files change.

gRPC asks before each handshake, in a thread of its own, which costs a look at the files. New files are checked here,
since gRPC would not report a certificate that it cannot use. A certificate that has expired, or is not yet valid, does
not replace a valid one.
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


def credentials(*, cert: str, key: str, client_ca: str) -> grpc.ServerCredentials:
    """Returns what a gRPC server listens with.

    Args:
        cert: The path of the certificate in PEM, with those between it and the root.
        key: The path of its key in PEM.
        client_ca: The path of the certificates in PEM that sign those of clients; empty: clients need none.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a file is not what it should be, or a certificate is not valid now.
    """

    def read() -> _Certificate:
        return _read(cert, key, client_ca)

    files = ReloadedFiles("the certificate", [path for path in (cert, key, client_ca) if path], read)
    current = _Current(files)
    return grpc.dynamic_ssl_server_credentials(
        current.certificate.configuration,
        current.changed,  # type: ignore[arg-type]  # grpc-stubs does not know that None means no change
        require_client_authentication=bool(client_ca),
    )


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


class _ReloadedContext(ssl.SSLContext):
    """What an HTTP server listens with: each handshake uses the files as they are then."""

    files: ReloadedFiles[_Certificate]

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        """See `ssl.SSLContext`."""
        return self.files.get().context.wrap_bio(*args, **options)


def http_context(*, cert: str, key: str, client_ca: str) -> ssl.SSLContext:
    """Returns what an HTTP server listens with. The arguments and errors are those of `credentials`."""
    paths = [path for path in (cert, key, client_ca) if path]
    context = _ReloadedContext(ssl.PROTOCOL_TLS_SERVER)
    context.files = ReloadedFiles("the certificate of HTTP", paths, lambda: _read(cert, key, client_ca))
    return context


class _Current:
    """The certificate in force; warns once a day of one that will soon expire."""

    def __init__(self, files: ReloadedFiles[_Certificate]) -> None:
        self.certificate = files.get()
        self._files = files
        self._warn_at = 0.0
        self._warn()

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Returns the new certificate, if there is one since the last call."""
        found = self._files.get()
        is_new = found is not self.certificate
        if is_new:
            self.certificate, self._warn_at = found, 0.0
        self._warn()
        return found.configuration if is_new else None

    def _warn(self) -> None:
        if time.monotonic() >= self._warn_at:
            if warning := self.certificate.first_to_expire.warning(_now()):
                log.warning("a certificate of --tls-cert %s", warning)
            self._warn_at = time.monotonic() + _WARN_INTERVAL_S


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
        raise ValueError("they are being written; the next connection looks again")
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
