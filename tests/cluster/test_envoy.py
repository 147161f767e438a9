"""Envoy in front of three servers: every call gets its answer while servers are killed, drained and added."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cluster.envoy import WAIT_S, Envoy
from cluster.servers import Server

from layertap import Client

pytestmark = pytest.mark.timeout(600)
TEXTS = [f"text {n} of a stream through a balancer" for n in range(2000)]


def _same(found: np.ndarray, wanted: np.ndarray) -> None:
    """Checks values of different servers, each of which may lay its matrices out in its own way."""
    np.testing.assert_allclose(found, wanted, atol=2e-5)


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
        for n in range(20):
            _same(client.embed(TEXTS[n], pooling="mean").pooled[0], wanted[n])
        for thread in streams:
            thread.join(timeout=WAIT_S)
        assert done == [list(range(len(TEXTS)))] * 3
        assert drained.stop() == 0
    finally:
        for server in (kept, added):
            server.stop()


def _settled(value: Callable[[], int]) -> int:
    """Waits until a value has not changed for two seconds, and returns it."""
    deadline, last, since = time.monotonic() + WAIT_S, value(), time.monotonic()
    while time.monotonic() < since + 2:
        if (now := value()) != last:
            last, since = now, time.monotonic()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return last


def test_what_a_stalled_reader_does_not_take_is_not_held_by_envoy(tmp_path: Path) -> None:
    texts = [f"{n} " + "paris " * 500 for n in range(32)]
    server = Server("--instances", "1")
    envoy = Envoy(tmp_path, [server])
    try:
        with Client(envoy.target) as client, Client(envoy.target) as other:
            layer_bytes = other.embed(texts[0], layers=-1).last_hidden_state.nbytes
            received, memory = envoy.received_bytes(), envoy.memory
            parts = client.embed_layers(texts, layers="all", timeout_s=WAIT_S)
            taken = [next(parts)]
            waiting = _settled(envoy.received_bytes) - received
            growth = envoy.memory - memory
            assert other.embed(texts[1], pooling="mean").pooled.shape[0] == 1
            taken.extend(parts)
    finally:
        envoy.close()
        server.kill()
    found = sorted((part.layer, text) for part in taken for text in part.texts)
    assert found == sorted(itertools.product({layer for layer, _ in found}, range(len(texts))))
    assert {rows.nbytes for part in taken for rows in part.rows} == {layer_bytes}
    # 150 MB were asked for. A window of one call and the buffers on the way are all that may have left the server.
    assert layer_bytes * len(found) > 100 << 20 and waiting < 24 << 20 and growth < 24 << 20
