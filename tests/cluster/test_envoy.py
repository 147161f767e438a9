"""Envoy in front of three servers: every call gets its answer while servers are killed, drained and added."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cluster.servers import DEPLOY, Server

from layertap import Client

pytestmark = pytest.mark.timeout(300)
WAIT_S = 120.0
TEXTS = [f"text {n} of a stream through a balancer" for n in range(3000)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Envoy:
    """Envoy with the project's configuration, in front of given servers; the list can change while it runs.

    Attributes:
        target: Where clients connect.
    """

    def __init__(self, folder: Path, servers: Sequence[Server]) -> None:
        config = yaml.safe_load((DEPLOY / "envoy.yaml").read_text())
        port, self._admin = _free_port(), _free_port()
        self.target = f"127.0.0.1:{port}"
        resources = config["static_resources"]
        resources["listeners"][0]["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}
        config["admin"]["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": self._admin}
        (cluster,) = resources.pop("clusters")
        cluster["health_checks"][0].update(interval="0.2s", timeout="2s", no_traffic_interval="0.2s")
        # As in production the list of servers changes while Envoy runs; here by a file that it watches.
        cluster["type"] = "EDS"
        source = {"resource_api_version": "V3", "path_config_source": {"path": str(folder / "endpoints.yaml")}}
        cluster["eds_cluster_config"] = {"service_name": "layertap", "eds_config": source}
        del cluster["load_assignment"], cluster["dns_refresh_rate"]
        resources["clusters"] = [cluster]
        config["node"] = {"id": "test", "cluster": "test"}
        self._folder = folder
        self.serve(servers)
        (folder / "envoy.yaml").write_text(yaml.safe_dump(config))
        program = Path(sys.executable).parent / "envoy"
        self._log = (folder / "envoy.log").open("w")
        self._process = subprocess.Popen(
            [program, "-c", folder / "envoy.yaml", "--concurrency", "2", "--use-dynamic-base-id"],
            stdout=self._log,
            stderr=self._log,
        )
        self.wait(len(servers))

    def serve(self, servers: Sequence[Server]) -> None:
        """Changes the list of servers."""
        endpoints = [
            {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": _port(server)}}}}
            for server in servers
        ]
        resource = {
            "@type": "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            "cluster_name": "layertap",
            "endpoints": [{"lb_endpoints": endpoints}],
        }
        draft = self._folder / "draft.yaml"
        draft.write_text(yaml.safe_dump({"resources": [resource]}))
        draft.replace(self._folder / "endpoints.yaml")

    def healthy(self) -> dict[int, bool]:
        """Returns the ports of the servers, and whether Envoy sends calls there."""
        url = f"http://127.0.0.1:{self._admin}/clusters?format=json"
        with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
            found = json.load(answer)
        (cluster,) = [one for one in found["cluster_statuses"] if one["name"] == "layertap"]
        return {
            host["address"]["socket_address"]["port_value"]: host["health_status"] == {"eds_health_status": "HEALTHY"}
            for host in cluster.get("host_statuses", [])
        }

    def wait(self, count: int) -> None:
        """Waits until so many servers are healthy."""
        deadline = time.monotonic() + WAIT_S
        while True:
            with contextlib.suppress(OSError, ValueError):
                if sum(self.healthy().values()) == count:
                    return
            assert time.monotonic() < deadline, (self._folder / "envoy.log").read_text()[-3000:]
            assert self._process.poll() is None, (self._folder / "envoy.log").read_text()[-3000:]
            time.sleep(0.05)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=WAIT_S)
        self._log.close()


def _same(found: np.ndarray, wanted: np.ndarray) -> None:
    """Checks values of different servers, each of which may lay its matrices out in its own way."""
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def _port(server: Server) -> int:
    return int(server.address.rpartition(":")[2])


@pytest.fixture
def envoy(tmp_path: Path, servers: list[Server]) -> Iterator[Envoy]:
    made = Envoy(tmp_path, servers)
    yield made
    made.close()


@pytest.fixture
def client(envoy: Envoy) -> Iterator[Client]:
    with Client(envoy.target) as client:
        yield client


def test_calls_of_every_kind_pass_and_are_spread(client: Client, envoy: Envoy, servers: list[Server]) -> None:
    with Client(servers[0].address) as direct:
        wanted = direct.embed(TEXTS[:8], layers="all", pooling="mean")
    found = client.embed(TEXTS[:8], layers="all", pooling="mean")
    _same(found.pooled, wanted.pooled)
    for layer in wanted.layers:
        _same(found.hidden_states[layer], wanted.hidden_states[layer])
    _same(client.embed(TEXTS[:8], pooling="mean").pooled, wanted.pooled)
    layers = {rows.layer for rows in client.embed_layers(TEXTS[:8])}
    assert layers == set(wanted.layers) and client.tokenize("a b").token_counts.tolist() == [4]
    assert [item.index for item in client.embed_stream(TEXTS[:100], pooling="mean")] == list(range(100))


def _stream(client: Client, wanted: np.ndarray, done: list[Any]) -> None:
    indices = []
    for item in client.embed_stream(TEXTS, pooling="mean"):
        _same(item.embedding.pooled[0], wanted[item.index])
        indices.append(item.index)
    done.append(indices)


def test_nothing_is_lost_while_servers_die_leave_and_come(
    client: Client, envoy: Envoy, servers: list[Server], tmp_path: Path
) -> None:
    with Client(servers[0].address) as direct:
        wanted = np.concatenate([item.embedding.pooled for item in direct.embed_stream(TEXTS, pooling="mean")])
    done: list[Any] = []
    streams = [threading.Thread(target=_stream, args=(client, wanted, done)) for _ in range(3)]
    for thread in streams:
        thread.start()
    killed, drained, kept = servers
    _same(client.embed(TEXTS[0], pooling="mean").pooled[0], wanted[0])
    killed.kill()
    envoy.wait(2)
    _same(client.embed(TEXTS[1], pooling="mean").pooled[0], wanted[1])
    added = Server("--instances", "1", "--grace-s", "20")
    try:
        servers.append(added)
        envoy.serve([drained, kept, added])
        envoy.wait(3)
        drained.signal(signal.SIGTERM)
        for n in range(50):
            _same(client.embed(TEXTS[n], pooling="mean").pooled[0], wanted[n])
        for thread in streams:
            thread.join(timeout=WAIT_S)
        assert done == [list(range(len(TEXTS)))] * 3
        assert drained.stop() == 0
    finally:
        for server in (kept, added):
            server.stop()
