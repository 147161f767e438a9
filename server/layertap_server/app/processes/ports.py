"""Ports that several processes are to listen on: checked, chosen and kept before any of them does.

A port is kept by sockets that are bound and do not listen: the system passes connections to listening sockets alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket

from layertap_server.config import Config, ConfigError
from layertap_server.rpc.address import addresses, check_port


def keep_ports(config: Config, kept: contextlib.ExitStack) -> Config:
    """Binds the ports of a server until the stack is closed; returns the settings with these in place of 0.

    Raises:
        ConfigError: if one cannot be listened on.
    """
    port, http_port = _keep(config.host, config.port, kept, flag="--port"), config.http_port
    if http_port >= 0:
        http_port = _keep(config.host, http_port, kept, flag="--http-port")
    return dataclasses.replace(config, port=port, http_port=http_port)


def _keep(host: str, port: int, kept: contextlib.ExitStack, *, flag: str) -> int:
    """Binds a port on each address of a host; returns it."""
    # Without sharing, so that a program that already listens there is found.
    check_port(host, port, flag=flag)
    try:
        for family, kind, protocol, _, where in addresses(host, port):
            one = kept.enter_context(socket.socket(family, kind, protocol))
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind((where[0], port, *where[2:]))
            port = one.getsockname()[1]
    except OSError as exc:
        raise ConfigError(f"cannot keep port {port} of {host}: {exc.strerror or exc}; try {flag} 0") from exc
    return port
