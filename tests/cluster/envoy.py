"""Envoy in a process, as deploy/envoy.yaml configures it, in front of servers of a test."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import yaml
from cluster.servers import DEPLOY, ROOT

from layertap_server.testing import ServerProcess

WAIT_S = 120.0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _port(server: ServerProcess) -> int:
    return int(server.address.rpartition(":")[2])


class Envoy:
    """Envoy with the project's configuration, in front of given servers; the list can change while it runs.

    Attributes:
        target: Where clients connect.
    """

    def __init__(self, folder: Path, servers: Sequence[ServerProcess]) -> None:
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
        self._log = (folder / "envoy.log").open("w")
        self._process = subprocess.Popen(
            [ROOT / ".cluster/bin/envoy", "-c", folder / "envoy.yaml", "--concurrency", "2", "--use-dynamic-base-id"],
            stdout=self._log,
            stderr=self._log,
        )
        self.wait(len(servers))

    def serve(self, servers: Sequence[ServerProcess]) -> None:
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

    def received_bytes(self) -> int:
        """Returns how many bytes have come from the servers."""
        url = f"http://127.0.0.1:{self._admin}/stats?filter=cluster.layertap.upstream_cx_rx_bytes_total&format=json"
        with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
            (found,) = json.load(answer)["stats"]
        return int(found["value"])

    @property
    def memory(self) -> int:
        """The memory that Envoy holds, in bytes."""
        status = Path(f"/proc/{self.process_id}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) << 10

    @property
    def process_id(self) -> int:
        return self._process.pid

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
