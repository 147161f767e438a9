"""Connections that are slow, silent or cut, clients and servers that freeze: both sides recover, with right numbers."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support import Server, poll, running
from support.proxy import Proxy

from layertap import Client, DeadlineExceededError, Embedding, UnavailableError

WAIT_S = 60.0
TEXTS = [f"text {n} " + "of many words " * (n % 30) for n in range(300)]
LONG = "paris " * 510
"""512 tokens, all four layers: nearly all the memory for outputs that the server has."""


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[Server]:
    """Drops who does not read for a second, asks the silent after a second, waits five for their answer."""
    with running(
        *("--device", "cpu", "--model-id", str(tiny_folder), "--instances", "1", "--stall-timeout-s", "1"),
        *("--max-output-bytes", "300000", "--max-call-output-bytes", "300000"),
        *("--keepalive-time-s", "1", "--keepalive-timeout-s", "5"),
        *("--shared-memory-bytes", str(1 << 20), "--max-shared-memory-call-count", "1"),
    ) as started:
        yield started


@pytest.fixture(scope="module")
def wanted(server: Server) -> list[np.ndarray]:
    with Client(server.address) as client:
        return [result.embedding.last_hidden_state for result in client.embed_stream(TEXTS)]


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with Proxy(server.address) as made:
        yield made


def same(found: Embedding, rows: np.ndarray) -> bool:
    return found.last_hidden_state.shape == rows.shape and bool(np.abs(found.last_hidden_state - rows).max() <= 2e-5)


@pytest.mark.parametrize("ordered", [True, False])
def test_a_stream_through_cut_connections_gives_every_result_once(
    proxy: Proxy, wanted: list[np.ndarray], ordered: bool
) -> None:
    chance = random.Random(int(ordered))
    proxy.cut_after = [chance.randrange(150_000, 400_000) for _ in range(4)]
    with Client(proxy.address) as client:
        found = list(client.embed_stream(TEXTS, ordered=ordered, reconnect_timeout_s=WAIT_S))
    assert proxy.cut_count >= 2
    indices = [result.index for result in found]
    assert indices == list(range(len(TEXTS))) if ordered else sorted(indices) == list(range(len(TEXTS)))
    assert all(result.error is None and same(result.embedding, wanted[result.index]) for result in found)


def test_calls_on_a_cut_connection_fail_as_unavailable_and_the_next_one_succeeds(
    proxy: Proxy, wanted: list[np.ndarray]
) -> None:
    with Client(proxy.address) as client:
        assert same(client.embed(TEXTS[0]), wanted[0])
        parts = client.embed_layers([LONG] * 30)
        assert next(parts).layer == 0
        proxy.cut()
        with pytest.raises(UnavailableError):
            list(parts)
        poll(lambda: _answers(client))
        assert same(client.embed(TEXTS[1]), wanted[1])


def _answers(client: Client) -> bool:
    with contextlib.suppress(UnavailableError):
        client.model_info()
        return True
    return False


def test_a_connection_that_takes_more_than_a_second_is_made(proxy: Proxy) -> None:
    proxy.delay_s = 1.2
    with Client(proxy.address, retries=0) as client:
        assert client.model_info().layer_count == 3


def test_slow_connections_only_take_longer(proxy: Proxy, wanted: list[np.ndarray]) -> None:
    proxy.delay_s, proxy.bytes_a_second = 0.01, 2_000_000
    with Client(proxy.address) as client:
        found = client.embed(TEXTS[:100])
        for rows, right in zip(found.ragged(-1), wanted, strict=False):
            assert np.abs(rows - right[0]).max() <= 2e-5
        for result, right in zip(client.embed_stream(TEXTS[:100]), wanted, strict=False):
            assert same(result.embedding, right)


def test_a_silent_connection_ends_within_the_stated_times_and_the_client_goes_on_after_it(
    proxy: Proxy, wanted: list[np.ndarray]
) -> None:
    with Client(proxy.address) as client:
        stream = client.embed_stream(TEXTS * 20, item_timeout_s=3)
        assert same(next(stream).embedding, wanted[0])
        proxy.swallow(True)
        with pytest.raises(DeadlineExceededError, match="item_timeout_s"):
            list(stream)
        with pytest.raises(DeadlineExceededError, match="timeout_s"):
            client.embed(TEXTS[0], timeout_s=0.5)
        proxy.swallow(False)
        poll(lambda: _answers(client))
        assert same(client.embed(TEXTS[1]), wanted[1])


def test_a_frozen_server_is_waited_for_or_given_up_and_serves_on(server: Server, wanted: list[np.ndarray]) -> None:
    thaw = threading.Timer(1.5, server.signal, (signal.SIGCONT,))
    try:
        with Client(server.address) as client:
            for n, result in enumerate(client.embed_stream(TEXTS)):
                if n == 5:
                    server.signal(signal.SIGSTOP)
                    thaw.start()
                assert result.index == n and same(result.embedding, wanted[n])
            server.signal(signal.SIGSTOP)
            with pytest.raises(DeadlineExceededError):
                client.embed(TEXTS[0], timeout_s=0.5)
            with pytest.raises(DeadlineExceededError):
                list(client.embed_stream(TEXTS, item_timeout_s=0.5))
            server.signal(signal.SIGCONT)
            assert same(client.embed(TEXTS[2]), wanted[2])
    finally:
        thaw.cancel()
        server.signal(signal.SIGCONT)


READS_AND_FREEZES = """
import sys
import numpy as np
from layertap import Client
with Client(sys.argv[1], shared_memory=len(sys.argv) > 2) as client:
    print("connected", client.embed("x").layers, flush=True)
    count = 0
    for result in client.embed_stream(("paris " * 510 for _ in range(60)), layers="all"):
        assert result.error is None and result.index == count, result
        assert all(np.isfinite(rows).all() and np.abs(rows).max() > 0.1 for rows in result.embedding.hidden_states)
        count += 1
        if count == 1:
            print("reading", flush=True)
            sys.stdin.readline()
    print("done", count, flush=True)
"""


@contextlib.contextmanager
def client_process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", READS_AND_FREEZES, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(WAIT_S)
        process.stdin.close()
        process.stdout.close()


def test_a_frozen_client_is_dropped_and_goes_on_where_it_was(server: Server) -> None:
    with client_process(server.address) as process, Client(server.address) as other:
        assert process.stdout.readline().startswith("connected")
        assert process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGSTOP)
        # A whole long text finds room only when what the frozen one holds has been given back.
        assert other.embed(LONG, layers="all", timeout_s=WAIT_S).layers == (0, 1, 2, 3)
        process.send_signal(signal.SIGCONT)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done 60\n"


def test_memory_shared_with_a_frozen_client_is_taken_back(server: Server) -> None:
    with client_process(server.address, "shared") as process:
        assert process.stdout.readline().startswith("connected")
        assert process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGSTOP)

        def shares_again() -> bool:
            with Client(server.address, shared_memory=True) as other:
                other.embed(["paris " * 300] * 2, layers="all", timeout_s=WAIT_S)
                return other.shared_memory.byte_count > 0

        poll(shares_again)
        process.send_signal(signal.SIGCONT)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done 60\n"
