"""Random bytes, mutated messages, random texts, ids, masks, options over every RPC: no crash, no hang, known codes."""

from __future__ import annotations

import asyncio
import random
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import Server, running
from support.fuzzing import Fuzzer

from layertap import Client

GOOD = ["I love Paris", "Hello"]


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[Server]:
    flags = ("--device", "cpu", "--model-id", str(tiny_folder), "--log-level", "error")
    with running(*flags, "--shared-memory-bytes", str(1 << 20), "--max-character-count", "2000") as started:
        yield started
        assert not started.log, started.log.decode()


def test_whatever_is_sent_ends_with_a_code_of_the_contract(server: Server) -> None:
    codes: Counter[tuple[str, str]] = Counter()
    with Client(server.address) as client:
        wanted = client.embed(GOOD, layers="all").hidden_states

        @settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(seed=st.integers(0, 2**40))
        def fuzz(seed: int) -> None:
            fuzzer = Fuzzer(server.address, heavy_share=0.02)
            asyncio.run(fuzzer.run(100, seed=seed))
            codes.update(fuzzer.codes)

        fuzz()
        found = client.embed(GOOD, layers="all").hidden_states
        assert all(np.abs(one - other).max() < 1e-5 for one, other in zip(found, wanted, strict=True))
    assert codes.total() >= 1000
    for rpc in ("Tokenize", "Decode", "Embed", "EmbedLayers", "EmbedStream"):
        assert codes[rpc, "OK"] > 5 and codes[rpc, "INVALID_ARGUMENT"] > 5, (
            f"{rpc} is not fuzzed on both sides: {codes}"
        )


@pytest.mark.parametrize("preface", [b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"])
def test_bytes_that_are_not_http_2_harm_no_other_client(server: Server, preface: bytes) -> None:
    chance = random.Random(7)
    with Client(server.address) as client:
        for size in (1, 9, 100, 5000):
            for _ in range(5):
                host, port = server.address.rsplit(":", 1)
                with socket.create_connection((host, int(port)), timeout=10) as connection:
                    connection.sendall(preface + chance.randbytes(size))
        assert client.embed(GOOD).layers == (3,)
