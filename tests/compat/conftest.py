"""Servers for the tests of other projects' clients.

These tests run in an environment of their own, `.compat`, which has those clients and layertap's own, but not what the
server is made of: the server runs in a process of `.venv`. `make test-compat` runs them.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from layertap import Client
from layertap_server.testing import ServerProcess

ROOT = Path(__file__).parents[2]

FLAGS: tuple[str, ...] = ("--kserve",)
"""Flags that let the server of these tests speak the protocols of other clients."""


class Server(ServerProcess):
    """A layertap-server in a process of `.venv`."""

    def _start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        python = str(ROOT / ".venv/bin/python")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([python, *arguments], env=os.environ | dict(environment), **pipes)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A server with the embedded model and all protocols."""
    server = Server(*FLAGS)
    try:
        yield server
    except BaseException:
        server.kill()
        raise
    code = server.stop()
    assert code == 0, server.log
    assert "Traceback" not in server.log, server.log


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[Client]:
    """The client of layertap, whose answers are what other clients must get."""
    with Client(server.address) as client:
        yield client
