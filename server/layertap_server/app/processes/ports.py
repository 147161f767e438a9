"""Ports that several processes are to listen on: checked, chosen and kept before any of them does.

A port is kept by sockets that are bound and do not listen: the system passes connections to listening sockets alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket

from layertap_server.config import Config, ConfigError
from layertap_server.rpc.address import ListenError, check_port


class KeptPorts:
    """The ports of one server.

    Attributes:
        config: The settings, with ports in place of 0.
    """

    def __init__(self, config: Config) -> None:
        """Binds the ports.

        Raises:
            ConfigError: if one cannot be listened on.
        """
        self._sockets = contextlib.ExitStack()
        port, http_port = self._keep(config.host, config.port, flag="--port"), config.http_port
        if http_port >= 0:
            http_port = self._keep(config.host, http_port, flag="--http-port")
        self.config = dataclasses.replace(config, port=port, http_port=http_port)

    def close(self) -> None:
        """Lets the ports go."""
        self._sockets.close()

    def _keep(self, host: str, port: int, *, flag: str) -> int:
        """Binds a port on each address of a host; returns it."""
        try:
            # Without sharing, so that a program that already listens there is found.
            check_port(host, port, flag=flag)
            found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, kind, protocol, _, where in found:
                kept = self._sockets.enter_context(socket.socket(family, kind, protocol))
                kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                if family == socket.AF_INET6:
                    kept.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                kept.bind((where[0], port, *where[2:]))
                port = kept.getsockname()[1]
        except ListenError as exc:
            raise ConfigError(str(exc)) from exc
        except OSError as exc:
            raise ConfigError(f"cannot keep port {port} of {host}: {exc.strerror or exc}; try {flag} 0") from exc
        return port
