"""A name of several servers: calls go round, and when its addresses change they follow without losing one."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cluster.names import NameServer
from cluster.servers import Server

from layertap import Client

pytestmark = pytest.mark.timeout(300)
WAIT_S = 60.0
NAME = "layertap.test"
HOSTS = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
"""A name has addresses and no ports, so the servers share a port on addresses of their own."""


def _free_port() -> int:
    with contextlib.ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in HOSTS]
        sockets[0].bind((HOSTS[0], 0))
        port = int(sockets[0].getsockname()[1])
        for probe, host in zip(sockets[1:], HOSTS[1:], strict=True):
            probe.bind((host, port))
        return port


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Server]]:
    """Servers whose connections get one second old; the last test ends two of them."""
    port = _free_port()
    flags = ["--port", str(port), "--instances", "1", "--max-connection-age-s", "1", "--insecure-listen"]
    with ThreadPoolExecutor() as starts:
        started = list(starts.map(lambda host: Server("--host", host, *flags), HOSTS))
    try:
        yield started
    finally:
        for server in started:
            server.kill()


@pytest.fixture
def names() -> Iterator[NameServer]:
    made = NameServer(NAME, HOSTS[:2])
    yield made
    made.close()


@pytest.fixture
def client(names: NameServer, servers: Sequence[Server]) -> Iterator[Client]:
    port = servers[0].address.rpartition(":")[2]
    # gRPC asks for a name once in 30 s at most, unless it is set otherwise.
    options = [("grpc.dns_min_time_between_resolutions_ms", 100)]
    with Client(f"dns://{names.address}/{NAME}:{port}", options=options) as client:
        yield client


def _served(server: Server) -> int:
    return server.log.count("method=Embed ")


def _call_until(client: Client, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        client.embed("text", pooling="mean")
        assert time.monotonic() < deadline


def test_calls_go_to_every_address_of_the_name_and_to_no_other(client: Client, servers: list[Server]) -> None:
    _call_until(client, lambda: min(map(_served, servers[:2])) >= 8)
    assert _served(servers[2]) == 0


def test_a_stream_that_outlives_its_connection_has_every_result_once(client: Client, servers: list[Server]) -> None:
    with Client(servers[0].address) as direct:
        (wanted,) = direct.embed("text", pooling="mean").pooled
    start = time.monotonic()

    def texts() -> Iterator[str]:
        while time.monotonic() < start + 4:
            yield "text"
            time.sleep(0.001)

    indices = []
    for item in client.embed_stream(texts(), pooling="mean"):
        np.testing.assert_allclose(item.embedding.pooled[0], wanted, atol=2e-5)
        indices.append(item.index)
    assert indices == list(range(len(indices))) and len(indices) > 100


def test_calls_follow_the_addresses_of_the_name_and_leave_a_server_that_dies(
    client: Client, names: NameServer, servers: list[Server]
) -> None:
    dropped, killed, gained = servers
    _call_until(client, lambda: _served(dropped) > 0)
    names.addresses = HOSTS[1:]  # Nothing fails: connections that got old are what makes the client ask again.
    _call_until(client, lambda: _served(gained) > 0)
    assert dropped.stop() == 0
    killed.kill()
    before = _served(gained)
    _call_until(client, lambda: _served(gained) > before + 20)
