"""The launcher of servers for users' tests."""

from __future__ import annotations

import subprocess
import sys

import pytest

from layertap import Client
from layertap_server.testing import ServerError, running_server


def test_importing_the_launcher_imports_no_torch() -> None:
    code = "import sys, layertap_server.testing; sys.exit('torch' in sys.modules or 'grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_server_runs_for_the_block_and_has_stopped_after_it() -> None:
    with running_server("--device", "cpu", "--instances", "1") as server:
        with Client(server.address) as client:
            assert client.embed("x").layers
        assert server.process.poll() is None
    assert server.process.returncode == 0 and "stopped" in server.log


def test_a_server_that_does_not_start_raises_with_its_log() -> None:
    with pytest.raises(ServerError, match="--no-such-flag"), running_server("--no-such-flag"):
        raise AssertionError("the block must not run")


def test_an_error_of_the_block_is_kept_and_the_server_is_gone() -> None:
    servers = []
    with pytest.raises(ZeroDivisionError), running_server("--device", "cpu", "--instances", "1") as server:
        servers.append(server)
        raise ZeroDivisionError
    assert servers[0].process.returncode is not None
