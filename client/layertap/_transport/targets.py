"""What a target names: its form for gRPC, whether it is this host, and the proxy that gRPC takes to it. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Final

from layertap.errors import InvalidArgumentError

DEFAULT_PORT: Final = 50051

_SCHEMES: Final = ("dns:", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "vsock:", "xds:")
_URLS: Final = ("http", "https", "grpc", "grpcs")
_SOCKETS: Final = ("unix:", "unix-abstract:")
_PROXIES: Final = ("grpc_proxy", "https_proxy", "http_proxy")
"""The variables that name a proxy, in the order in which gRPC reads them."""


def uri(target: str) -> str:
    """Returns a target in gRPC's form, with the default port where it has none.

    Raises:
        InvalidArgumentError: if it is a URL, or a list of something else than addresses.
    """
    scheme, mark, rest = target.partition("://")
    if mark and scheme.lower() in _URLS:
        host = rest.partition("/")[0].rpartition("@")[2]
        tls = " and tls=True" if scheme.lower().endswith("s") else ""
        raise InvalidArgumentError(f"target is a URL; pass target={_with_port(host)!r}{tls} instead")
    if target.startswith("dns:"):
        head, slash, name = target.rpartition("/") if "/" in target else ("", "dns:", target.removeprefix("dns:"))
        return f"{head}{slash}{_with_port(name)}"
    if target.startswith(_SCHEMES):
        return target
    if "," not in target:
        return _with_port(target)
    addresses = [_address(one.strip()) for one in target.split(",")]
    versions = {version for version, _ in addresses}
    if len(versions) > 1:
        raise InvalidArgumentError("target has IPv4 and IPv6 addresses; pass several of one kind")
    return f"ipv{versions.pop()}:" + ",".join(text for _, text in addresses)


def is_local(target: str) -> bool:
    """Returns whether what is sent to a target stays on this host for certain."""
    return all(one.startswith(_SOCKETS) or _is_loopback(_host(one)) for one in target.split(","))


def proxy_variable(target: str, environment: Mapping[str, str]) -> str | None:
    """Returns the variable that names the proxy which gRPC takes to a target; None: it takes none."""
    if is_local(target) or target.startswith(_SOCKETS):
        return None
    exceptions = environment.get("no_grpc_proxy") or environment.get("no_proxy") or ""
    host = _host(target)
    if any(_matches(host, one.strip()) for one in exceptions.split(",") if one.strip()):
        return None
    return next((name for name in _PROXIES if environment.get(name)), None)


def _with_port(host: str) -> str:
    try:
        if ipaddress.ip_address(host).version == 6:
            return f"[{host}]:{DEFAULT_PORT}"
    except ValueError:
        pass
    if host.endswith("]") or ":" not in host:
        return f"{host}:{DEFAULT_PORT}"
    return host


def _host(target: str) -> str:
    """Returns the host of one target; "" where it is another server's to say."""
    if target.startswith(("dns:", "ipv4:", "ipv6:")):
        target = target.partition(":")[2]
        if target.startswith("//"):
            authority, _, target = target[2:].partition("/")
            if authority:
                return ""
    elif target.startswith(_SCHEMES):
        return ""
    return _with_port(target.strip()).rpartition(":")[0].strip("[]")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _matches(host: str, exception: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(exception, strict=False)
    except ValueError:
        return host.lower().endswith(exception.lower())


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
