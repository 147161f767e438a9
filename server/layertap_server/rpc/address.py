"""The address that a server listens on: whether it can, and why not."""

from __future__ import annotations

import errno
import os
import socket
import stat
from typing import Any, Final

from layertap_server.flags import ConfigError

_NOT_HERE: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""The errors of an address that this machine does not have."""


def join_host_port(host: str, port: int) -> str:
    """Returns `host:port`; an IPv6 address gets its brackets."""
    host = host.strip("[]")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[Any, ...]]]:
    """Returns the addresses of a host, as getaddrinfo does, without those that this machine lacks if it has others.

    Without IPv6 localhost often still has the address ::1.

    Raises:
        OSError: if the name does not resolve.
    """
    found: list[Any] = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return [one for one in found if _is_here(*one)] or found


def _is_here(family: int, kind: int, protocol: int, _: str, where: tuple[Any, ...]) -> bool:
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.bind((where[0], 0, *where[2:]))
    except OSError as exc:
        return exc.errno not in _NOT_HERE
    return True


def check_port(host: str, port: int, *, flag: str) -> None:
    """Checks that a port can be listened on.

    Args:
        host: A host name or an address.
        port: The port; 0: any free one.
        flag: The flag of the port, for the message.

    Raises:
        ConfigError: if it cannot.
    """
    address = join_host_port(host, port)
    try:
        found = addresses(host, port)
    except (OSError, UnicodeError) as exc:
        raise ConfigError(
            f"cannot listen on {address}: the host name does not resolve; use an address of this machine"
        ) from exc
    for family, kind, protocol, _, where in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(where)
        except OSError as exc:
            raise ConfigError(f"cannot listen on {address}: {_why_not(exc, flag)}") from exc


def free_socket_file(address: str) -> None:
    """Removes the file of a unix socket that a killed server has left.

    gRPC would remove any, also that of a running server, whose callers would then be lost in silence.

    Raises:
        ConfigError: if another program listens there, or the file is not a socket.
    """
    if not address.startswith("unix:"):
        return
    path = address.removeprefix("unix:")
    path = "/" + path.lstrip("/") if path.startswith("//") else path
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise ConfigError(f"--host is {address}, but that file is not a socket; choose another path")
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


def _why_not(exc: OSError, flag: str) -> str:
    if exc.errno == errno.EADDRINUSE:
        return f"the port is taken; stop the program that has it, or use another port ({flag} 0: any free one)"
    if exc.errno in (errno.EACCES, errno.EPERM):
        return f"this user may not listen on this port; use a {flag} of 1024 or more"
    if exc.errno in _NOT_HERE:
        return "this machine does not have this address; use one of its own, or 127.0.0.1"
    return exc.strerror or str(exc)
