"""Servers for the tests of other projects' clients.

These tests run in an environment of their own, `.compat`, which has those clients and layertap's own, but not what the
server is made of: the server runs in a process of `.venv`. `make test-compat` runs them.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from layertap import Client
from layertap_server.testing import ServerProcess

ROOT = Path(__file__).parents[2]

FLAGS: tuple[str, ...] = ("--kserve", "--http-port", "0")
"""Flags that let the server of these tests speak the protocols of other clients."""


class Server(ServerProcess):
    """A layertap-server in a process of `.venv`."""

    def _start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        python = str(ROOT / ".venv/bin/python")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([python, *arguments], env=os.environ | dict(environment), **pipes)


@contextlib.contextmanager
def running(*flags: str) -> Iterator[Server]:
    """Runs a server with the embedded model, and checks that it ends well."""
    server = Server(*flags)
    try:
        yield server
    except BaseException:
        server.kill()
        raise
    code = server.stop()
    assert code == 0, server.log
    assert "Traceback" not in server.log, server.log


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A server with all protocols."""
    with running(*FLAGS) as server:
        yield server


@pytest.fixture(scope="session")
def openai_url(server: Server) -> str:
    """Where clients of OpenAI's API find the server."""
    return url_of(server)


@pytest.fixture
def guarded_url(tmp_path: Path) -> Iterator[str]:
    """Where they find one that asks for the token "alices-token-0123" and has two places for calls."""
    tokens = tmp_path / "tokens"
    tokens.write_text("alice alices-token-0123\n")
    tokens.chmod(0o600)
    with running("--http-port", "0", "--token-file", str(tokens), "--max-concurrent-call-count", "2") as server:
        yield url_of(server)


def url_of(server: Server) -> str:
    """Returns where clients of OpenAI's API find a server."""
    (line,) = [line for line in server.log.splitlines() if "listens for HTTP" in line]
    return line.rpartition("address=")[2] + "/v1"


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[Client]:
    """The client of layertap, whose answers are what other clients must get."""
    with Client(server.address) as client:
        yield client


@pytest.fixture(scope="session")
def model(client: Client) -> str:
    """The name that clients know the model by."""
    return client.model_info().model_id
