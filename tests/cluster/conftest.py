"""Fixtures of the tests of what stands around servers.

They run in an environment of their own, `.cluster`, which has Envoy, the schemas of Kubernetes and layertap's client;
servers run in processes of `.venv`. `make test-cluster` runs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from cluster.servers import Server


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    """Three servers with the embedded model; those that still run are killed."""
    with ThreadPoolExecutor() as starts:
        started = list(starts.map(lambda _: Server("--instances", "1", "--grace-s", "20"), range(3)))
    try:
        yield started
    finally:
        for server in started:
            server.kill()
