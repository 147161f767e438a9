"""Health for probes and balancers: by service, as it is and as it changes, and as an exit code."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support import Server, running

WAIT_S = 30.0
NAMES = ["", "layertap.v1.EmbeddingService"]
STATUS = health_pb2.HealthCheckResponse


def health_command(target: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "layertap", "health", "--target", target, "--timeout-s", "10"]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)


@pytest.mark.parametrize("name", NAMES)
def test_each_service_has_its_health(tiny_server: Server, name: str) -> None:
    with grpc.insecure_channel(tiny_server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=WAIT_S).status == STATUS.SERVING


def test_a_service_that_is_not_there_is_not_found(tiny_server: Server) -> None:
    with grpc.insecure_channel(tiny_server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="no.Such"), timeout=WAIT_S)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_health_watch_sees_the_service_stop(tiny_folder: Path) -> None:
    flags = ("--device", "cpu", "--model-id", str(tiny_folder))
    with running(*flags) as server, grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest(service=name), timeout=WAIT_S) for name in NAMES]
        assert [next(watch).status for watch in watches] == [STATUS.SERVING] * 2
        server.signal(signal.SIGTERM)
        assert [next(watch).status for watch in watches] == [STATUS.NOT_SERVING] * 2
        for watch in watches:
            watch.cancel()
        assert server.process.wait(WAIT_S) == 0


def test_the_health_command_ends_with_0_or_1(tiny_server: Server) -> None:
    good = health_command(tiny_server.address)
    assert (good.returncode, good.stdout) == (0, "SERVING\n"), good.stderr
    bad = health_command("127.0.0.1:1")
    assert bad.returncode == 1 and not bad.stdout and bad.stderr.count("\n") == 1, bad.stderr
