"""Where a server listens: what is wrong is said before a model loads, and watchers of health see the end."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support import running

from layertap import Client
from layertap_server.app import lifecycle
from layertap_server.flags import ConfigError
from layertap_server.rpc.address import check_port, join_host_port
from layertap_server.rpc.health import HealthService

STATUS = health_pb2.HealthCheckResponse
WAIT_S = 30.0


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


REFUSED = """
import sys
from layertap_server.cli import main
code = main(sys.argv[1:])
assert "torch" not in sys.modules
sys.exit(code)
"""


@pytest.mark.parametrize("flag", ["--port", "--metrics-port"])
def test_a_taken_port_is_refused_in_one_line_before_torch_is_imported(flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-c", REFUSED, "--port", "0", flag, port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 2 and not done.stdout
    assert re.search(rf"^.*127.0.0.1:{port}: the port is taken.*{flag} 0.*\n$", done.stderr), done.stderr


def test_each_reason_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="does not have this address"):
        check_port("192.0.2.1", 0, flag="--port")
    with pytest.raises(ConfigError, match="does not resolve"):
        check_port("no.such.host.invalid", 0, flag="--port")

    def forbidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", forbidden)
    with pytest.raises(ConfigError, match=r"this user may not listen.*1024"):
        check_port("127.0.0.1", 80, flag="--port")


def test_an_address_of_a_name_that_this_machine_lacks_is_passed_over(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n192.0.2.1 localhost\n")  # As ::1 is without IPv6.
    run = f"mount --bind {tmp_path}/hosts /etc/hosts && ip link set lo up && exec {sys.executable} -m layertap_server"
    isolated = ("unshare", "--user", "--map-root-user", "--net", "--mount", "sh", "-c", f'{run} "$@"', "sh")
    if subprocess.run([*isolated, "--version"], capture_output=True, timeout=WAIT_S).returncode:
        pytest.skip("this user may make no namespaces")
    flags = ("--device", "cpu", "--model-id", str(tiny_folder), "--port", "0", "--http-port", "0", "--processes", "2")
    command = [*isolated, *flags, "--host", "localhost"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout and server.stderr
        line = server.stdout.readline()
        server.terminate()
        assert line.startswith("layertap-server listens on localhost:"), server.stderr.read()


def test_ipv6_addresses_have_brackets() -> None:
    assert join_host_port("::1", 7) == join_host_port("[::1]", 7) == "[::1]:7"
    assert join_host_port("localhost", 7) == "localhost:7"


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_a_server_listens_on_ipv6(host: str, tiny_folder: Path) -> None:
    with running("--device", "cpu", "--model-id", str(tiny_folder), "--host", host) as server:
        assert server.address.startswith("[::1]:")
        with Client(server.address) as client:
            assert client.embed("x").layers == (3,)


class NoCalls:
    call_count = 0

    def close(self) -> None: ...

    def cut(self) -> None: ...

    async def emptied(self, timeout_s: float) -> bool:
        return True


class NoBatcher:
    def stop(self, timeout_s: float) -> bool:
        return True


def test_watchers_are_sent_not_serving_before_connections_close() -> None:
    """A hundred watchers on as many connections: each sees NOT_SERVING and then the end, never a cut."""

    async def watch(address: str, ready: asyncio.Semaphore) -> list[int]:
        async with grpc.aio.insecure_channel(address) as channel:
            found = []
            async for message in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
                found.append(message.status)
                ready.release()
            return found

    async def run() -> list[list[int]]:
        server = grpc.aio.server()
        health = HealthService(("",))
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        await health.set_serving(True)
        ready = asyncio.Semaphore(0)
        watches = [asyncio.create_task(watch(f"127.0.0.1:{port}", ready)) for _ in range(100)]
        for _ in watches:
            await asyncio.wait_for(ready.acquire(), WAIT_S)
        await health.set_serving(False)
        drained: Any = lifecycle.drain
        await drained(NoCalls(), NoBatcher(), stops=[server.stop], end_watches=health.end_watches, grace_s=1)
        return await asyncio.gather(*watches)

    assert asyncio.run(run()) == [[STATUS.SERVING, STATUS.NOT_SERVING]] * 100
