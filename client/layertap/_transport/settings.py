"""Where a client connects to and how: what its constructor was told, else what the environment says.

Pure but for the environment, which is read when a client is made, and the files of TLS, which are read when it
connects. Knows no gRPC; `channel` makes channels of this.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import ssl
from collections.abc import Mapping, Sequence
from typing import Any, Final

from layertap import wire
from layertap.errors import InvalidArgumentError

DEFAULT_TARGET: Final = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S: Final = 60.0
"""The deadline of calls for which the user names none, in seconds."""
DEFAULT_RETRIES: Final = 3

_MAX_RETRIES: Final = 4
"""gRPC makes five attempts at most."""
_SCHEMES: Final = ("dns:", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "vsock:", "xds:")
_RETRY: Final = {
    "initialBackoff": "0.1s",
    "maxBackoff": "1s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
}

Pem = bytes | str | os.PathLike[str]
Option = tuple[str, str | int]


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
            InvalidArgumentError: A certificate is there without its key, or a key without its certificate.
        """
        if (self.cert is None) != (self.key is None):
            given, missing = ("cert", "key") if self.key is None else ("key", "cert")
            raise InvalidArgumentError(f"tls has a {given} without its {missing}; pass both, or neither")

    def read(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """Returns ca, key and cert in PEM, reading files.

        Raises:
            InvalidArgumentError: A file cannot be read.
        """
        ca = _system_roots() if self.ca is None else _pem("tls.ca", self.ca)
        return ca, _pem("tls.key", self.key), _pem("tls.cert", self.cert)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """Everything that a channel is made of, and what each call needs.

    Attributes:
        target: What the user calls the server.
        tls: How it is encrypted; None: not at all.
        token: The bearer token that each call carries.
        retries: How often a call is repeated that the server could not take.
        options: What gRPC is told besides, as (name, value).
        timeout_s: The deadline of calls for which the user names none, in seconds.
    """

    target: str
    tls: TLS | None = None
    token: str | None = dataclasses.field(default=None, repr=False)
    retries: int = DEFAULT_RETRIES
    options: tuple[Option, ...] = ()
    timeout_s: float = DEFAULT_TIMEOUT_S

    @property
    def uri(self) -> str:
        """The target in gRPC's words."""
        return _uri(self.target)

    @property
    def is_local(self) -> bool:
        """Whether what is sent stays on this host."""
        return all(map(_is_local, self.target.split(",")))

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What each call carries."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    @property
    def service_config(self) -> str:
        """How gRPC is to repeat calls and to choose among several servers, in its JSON.

        A server says with its push-back when a call may be repeated, or that it need not be; gRPC obeys.
        """
        config: dict[str, Any] = {}
        if self.retries:
            policy = {"maxAttempts": self.retries + 1, **_RETRY}
            config["methodConfig"] = [{"name": [{"service": wire.SERVICE_NAME}], "retryPolicy": policy}]
        if self.uri.startswith("dns:") or "," in self.uri:
            config["loadBalancingConfig"] = [{"round_robin": {}}]
        return json.dumps(config)


def settle(
    target: str | None,
    *,
    tls: TLS | bool | None = None,
    token: str | None = None,
    retries: int = DEFAULT_RETRIES,
    options: Sequence[Option] = (),
    timeout_s: float | None = None,
) -> Connection:
    """Returns what a client is to use: its arguments, else LAYERTAP_… variables, else defaults.

    Raises:
        InvalidArgumentError: One of them cannot be what it is.
    """
    environment = os.environ
    if timeout_s is None:
        timeout_s = _seconds(environment.get("LAYERTAP_TIMEOUT_S") or DEFAULT_TIMEOUT_S)
    if not 0 < timeout_s < float("inf"):
        raise InvalidArgumentError(f"timeout_s is {timeout_s}; pass a number of seconds above 0")
    if not 0 <= retries <= _MAX_RETRIES:
        raise InvalidArgumentError(f"retries is {retries}; it runs from 0 to {_MAX_RETRIES}")
    token = environment.get("LAYERTAP_TOKEN") if token is None else token
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise InvalidArgumentError("token has characters that no token has; pass it without spaces and line ends")
    found = Connection(
        target=target or environment.get("LAYERTAP_TARGET") or DEFAULT_TARGET,
        tls=_tls_of(tls, environment),
        token=token or None,
        retries=retries,
        options=tuple(options),
        timeout_s=timeout_s,
    )
    _uri(found.target)
    if found.token and found.tls is None and not found.is_local and tls is not False:
        raise InvalidArgumentError(
            f"a token would go to {found.target} unencrypted; pass tls=True or tls=TLS(ca=…), or set LAYERTAP_TLS_CA; "
            "tls=False sends it nevertheless"
        )
    return found


def _tls_of(tls: TLS | bool | None, environment: Mapping[str, str]) -> TLS | None:
    if isinstance(tls, TLS):
        return tls
    if tls is False:
        return None
    paths = {name: environment.get(f"LAYERTAP_TLS_{name.upper()}") or None for name in ("ca", "cert", "key")}
    return TLS(**paths) if tls or any(paths.values()) else None


def _uri(target: str) -> str:
    if target.startswith(_SCHEMES) or "," not in target:
        return target
    addresses = [_address(one.strip()) for one in target.split(",")]
    versions = {version for version, _ in addresses}
    if len(versions) > 1:
        raise InvalidArgumentError("target has IPv4 and IPv6 addresses; pass several of one kind")
    return f"ipv{versions.pop()}:" + ",".join(text for _, text in addresses)


def _address(text: str) -> tuple[int, str]:
    """Returns one of several addresses, and which IP it is of."""
    host, _, port = text.rpartition(":")
    host = "127.0.0.1" if host == "localhost" else host
    try:
        return ipaddress.ip_address(host.strip("[]")).version, f"{host}:{int(port)}"
    except ValueError as exc:
        raise InvalidArgumentError(
            f"target has {text!r} among several; pass IP addresses with ports, such as 10.0.0.1:50051,10.0.0.2:50051, "
            "or one name that resolves to all of them: dns:///name:port"
        ) from exc


def _is_local(target: str) -> bool:
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    for scheme in _SCHEMES:
        target = target.removeprefix(scheme)
    host = target.strip().rpartition("/")[2].rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _seconds(value: str | float) -> float:
    try:
        return float(value)
    except ValueError as exc:
        raise InvalidArgumentError("LAYERTAP_TIMEOUT_S is no number of seconds; correct or unset it") from exc


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
    found = ssl.create_default_context().get_ca_certs(binary_form=True)
    return "".join(map(ssl.DER_cert_to_PEM_cert, found)).encode() or None
