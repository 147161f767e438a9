"""How a connection is encrypted: the certificates of the server, of the client, and of the authorities they trust.

Files are read when the client connects, not before.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from layertap.errors import InvalidArgumentError

Pem = bytes | str | os.PathLike[str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TLS:
    """How a connection is encrypted, and who is trusted.

    Attributes:
        ca: Who signs the server's certificate: PEM as bytes, or the path of a file. None: whom this system trusts.
        cert: The client's own certificate, for servers that ask for one; bytes or a path.
        key: Its key; bytes or a path.
        server_name: The name that the server's certificate must have. None: that of the target.
    """

    ca: Pem | None = None
    cert: Pem | None = None
    key: Pem | None = dataclasses.field(default=None, repr=False)
    server_name: str | None = None

    def __post_init__(self) -> None:
        """Checks what belongs together.

        Raises:
            InvalidArgumentError: if a certificate has no key, or a key no certificate.
        """
        if (self.cert is None) != (self.key is None):
            given, missing = ("cert", "key") if self.key is None else ("key", "cert")
            raise InvalidArgumentError(f"tls has a {given} without its {missing}; pass both, or neither")

    def read(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """Returns ca, key and cert in PEM, reading files.

        Raises:
            InvalidArgumentError: if a file cannot be read.
        """
        ca = _system_roots() if self.ca is None else _pem("tls.ca", self.ca)
        return ca, _pem("tls.key", self.key), _pem("tls.cert", self.cert)


def tls_of(tls: TLS | bool | None, environment: Mapping[str, str]) -> TLS | None:
    """Returns how a client encrypts, from its `tls` argument, else the LAYERTAP_TLS_… variables; None: not at all.

    Raises:
        InvalidArgumentError: if the argument is something else, such as the path of a file.
    """
    if isinstance(tls, TLS):
        return tls
    if tls is False:
        return None
    if tls not in (True, None):
        raise InvalidArgumentError(f"tls is of type {type(tls).__name__}; pass True, False or TLS(ca=…)")
    paths = {name: environment.get(f"LAYERTAP_TLS_{name.upper()}") or None for name in ("ca", "cert", "key")}
    return TLS(**paths) if tls or any(paths.values()) else None


def _pem(field: str, value: Pem | None) -> bytes | None:
    if value is None or isinstance(value, bytes):
        return value
    try:
        with open(value, "rb") as file:
            return file.read()
    except OSError as exc:
        raise InvalidArgumentError(f"{field} cannot be read: {exc.strerror}; pass a path, or PEM as bytes") from exc


def _system_roots() -> bytes | None:
    """Returns whom this system trusts; None: it does not say, and gRPC's own list is used."""
    import ssl  # Here, for few connections need it, and it is slow to import.

    found = ssl.create_default_context().get_ca_certs(binary_form=True)
    return "".join(map(ssl.DER_cert_to_PEM_cert, found)).encode() or None
