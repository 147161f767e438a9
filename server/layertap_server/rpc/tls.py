"""The server's side of TLS: its certificate, its key, and whose clients it lets in, read again when the files change.

gRPC asks before each handshake, in a thread of its own; a look at the files is all that costs. What is new is checked
here first, since gRPC would say nothing of a certificate that it cannot use.
"""

from __future__ import annotations

import ssl

import grpc

from layertap_server.rpc.file_reload import ReloadedFiles


def credentials(*, cert: str, key: str, client_ca: str) -> grpc.ServerCredentials:
    """Returns what a gRPC server listens with.

    Args:
        cert: The path of the certificate in PEM, with those between it and the root.
        key: The path of its key in PEM.
        client_ca: The path of the certificates in PEM that sign those of clients; empty: clients need none.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a file is not what it should be.
    """

    def read() -> grpc.ServerCertificateConfiguration:
        return _read(cert, key, client_ca)

    files = ReloadedFiles("the certificate", [path for path in (cert, key, client_ca) if path], read)
    return grpc.dynamic_ssl_server_credentials(
        files.get(),
        files.changed,  # type: ignore[arg-type]  # grpc-stubs does not know that None means no change
        require_client_authentication=bool(client_ca),
    )


def _read(cert: str, key: str, client_ca: str) -> grpc.ServerCertificateConfiguration:
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
    if (_pem(cert), _pem(key)) != (chain, secret):
        raise ValueError("they are being written; the next connection looks again")
    return grpc.ssl_server_certificate_configuration([(secret, chain)], root_certificates=roots)


def _pem(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _why(exc: ValueError | ssl.SSLError) -> str:
    return (exc.reason if isinstance(exc, ssl.SSLError) else "") or type(exc).__name__
