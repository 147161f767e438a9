"""A server of several processes, from its settings to its exit code."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from socket import socket
from typing import TYPE_CHECKING, NoReturn

from layertap_server.app.listening import open_endpoint
from layertap_server.app.processes import process
from layertap_server.app.processes.fork_server import ForkServer
from layertap_server.app.processes.ports import keep_ports
from layertap_server.app.processes.supervisor import Supervisor
from layertap_server.config import Config
from layertap_server.observability import log_format
from layertap_server.observability.bounded_streams import bounded_streams

if TYPE_CHECKING:
    from layertap_server.app.server import App


def run(config: Config, load: Callable[[Config], App], announce: Callable[[str, str, str], None]) -> int:
    """Serves until a signal stops the server, or it fails; returns the exit code.

    `load` is called in the process that others are forked from, and `announce` once the server is ready, with its
    address and the URLs of HTTP and of metrics.

    Raises:
        ConfigError: if the server cannot start.
    """
    with contextlib.ExitStack() as kept:
        return _run(keep_ports(config, kept), load, announce)


def _run(config: Config, load: Callable[[Config], App], announce: Callable[[str, str, str], None]) -> int:
    def run_process(app: App, end: socket, number: int) -> NoReturn:
        log_format.set_up(level=config.log_level, form=config.log_format, process=number)
        process.run(app, end, number)

    def show(address: str, http_url: str) -> None:
        metrics_url = ""
        if config.metrics_port >= 0:
            metrics_url = open_endpoint(supervisor.metrics.registry(), config).url
        announce(address, http_url, metrics_url)

    supervisor = Supervisor(
        config, start_fork_server=lambda: ForkServer(lambda: load(config), run_process), announce=show
    )
    # Only now: the fork server is forked of this process, which so far has one thread.
    with bounded_streams():
        log_format.set_up(level=config.log_level, form=config.log_format, process=0)
        return asyncio.Runner().run(supervisor.run())
