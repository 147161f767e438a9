"""Shared memory and unix sockets through real servers and both clients: same numbers, nothing lost, nothing left."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from support import BOUND, Server, open_client, poll, running

from layertap import Client, Embedding, UnavailableError
from layertap._shared_memory.mapping import Mapping, SharedMemory
from layertap.v1 import embedding_pb2 as pb
from layertap.v1 import embedding_pb2_grpc
from layertap_server.shared_memory.segment import LEAST_BYTES

WAIT_S = 30.0
LONG = "paris " * 510
"""512 tokens: 64 KiB a layer of the tiny model, 256 KiB all four."""
LONG_BYTES = 4 * 512 * 32 * 4
TEXTS = [LONG, "I love Paris", "two words " * 200, "", *(f"text {n} " + "of many words " * n for n in range(40))]

LEASE = """
import sys
from layertap import Client
client = Client(sys.argv[1], shared_memory=True)
held = client.embed("paris " * 510, layers="all")
assert client.shared_memory.byte_count > 0
print("ready", flush=True)
sys.stdin.read()
"""


def ended(server: Server) -> None:
    """Ends a server, however far the test has come with it."""
    if not server.process.stdout.closed:
        server.kill()


def flags(folder: Path, size: int = 64 << 20) -> tuple[str, ...]:
    return ("--device", "cpu", "--model-id", str(folder), "--shared-memory-bytes", str(size))


@contextlib.contextmanager
def opened(kind: str, target: str, *, shared_memory: bool = True) -> Iterator[Any]:
    with contextlib.closing(open_client(kind, target, shared_memory=shared_memory)) as client:
        yield client


def segment_count(server: Server) -> int:
    """Returns how many segments the server has open, mapped or as files."""
    found: list[str] = []
    for process in (psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children()):
        folder = Path(f"/proc/{process.pid}")
        for entry in (folder / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(entry))
        found.extend((folder / "maps").read_text().splitlines())
    return sum("memfd:layertap" in line for line in found)


@pytest.fixture(scope="module")
def large(tiny_folder: Path) -> Iterator[Server]:
    """Has room for everything at once."""
    left = set(os.listdir("/dev/shm"))
    with running(*flags(tiny_folder)) as server:
        yield server
        poll(lambda: not segment_count(server))
    assert set(os.listdir("/dev/shm")) <= left


@pytest.fixture(scope="module")
def small(tiny_folder: Path) -> Iterator[Server]:
    """Has room for two long texts with all layers."""
    with running(*flags(tiny_folder, 2 * LONG_BYTES), "--instances", "1") as server:
        yield server
        poll(lambda: not segment_count(server))


@pytest.fixture(scope="module")
def wanted(large: Server) -> Embedding:
    with Client(large.address) as plain:
        return plain.embed(TEXTS, layers="all", pooling="mean")


def check(found: Embedding, wanted: Embedding) -> None:
    assert found.layers == wanted.layers and found.token_counts.tolist() == wanted.token_counts.tolist()
    for layer in wanted.layers:
        for one, other in zip(found.ragged(layer), wanted.ragged(layer), strict=True):
            assert one.dtype == other.dtype and one.shape == other.shape
            assert np.abs(one - other).max() <= BOUND
    for one, other in zip(found.pools, wanted.pools, strict=True):
        assert np.abs(one - other).max() <= BOUND


# The same numbers.


def test_embed_gives_the_same_as_over_grpc(kind: str, large: Server, wanted: Embedding) -> None:
    with opened(kind, large.address) as client:
        check(client.embed(TEXTS, layers="all", pooling="mean"), wanted)
        assert client.shared_memory.byte_count > 0.9 * sum(wanted.token_counts) * 4 * 32 * 4
        lone = client.embed(LONG, layers=[1, 3], pooling=["cls"])
        assert np.abs(lone.hidden_states[3][0] - wanted.ragged(3)[0]).max() <= BOUND
        assert lone.pooled.shape == (1, 32)


def test_embed_layers_gives_the_same_as_over_grpc(kind: str, large: Server, wanted: Embedding) -> None:
    with opened(kind, large.address) as client:
        came = {layer: set(range(len(TEXTS))) for layer in wanted.layers}
        for part in client.embed_layers(TEXTS):
            for text, rows in zip(part.texts, part.rows, strict=True):
                came[part.layer].remove(text)
                assert np.abs(rows - wanted.ragged(part.layer)[text]).max() <= BOUND
        assert not any(came.values())
        assert client.shared_memory.byte_count > 0.9 * sum(wanted.token_counts) * 4 * 32 * 4


@pytest.mark.parametrize("ordered", [True, False])
def test_embed_stream_gives_the_same_as_over_grpc(kind: str, ordered: bool, large: Server, wanted: Embedding) -> None:
    items: list[Any] = [*TEXTS, [1 << 30], *TEXTS]  # One is refused, in the middle of a run.
    with opened(kind, large.address) as client:
        came = set()
        for result in client.embed_stream(
            iter(items), layers="all", pooling="mean", ordered=ordered, return_tokens=True
        ):
            came.add(result.index)
            if result.index == len(TEXTS):
                assert result.error is not None
                continue
            text = result.index % (len(TEXTS) + 1) if result.index < len(TEXTS) else result.index - len(TEXTS) - 1
            for layer in wanted.layers:
                (rows,) = result.embedding.ragged(layer)
                assert np.abs(rows - wanted.ragged(layer)[text]).max() <= BOUND
            assert np.abs(result.embedding.pooled[0] - wanted.pools[0][text]).max() <= BOUND
            assert len(result.embedding.tokens.tokens[0]) == wanted.token_counts[text]
        assert came == set(range(len(items)))
        # Less than that of a layer travels as bytes, and the load decides how many short texts a batch has.
        alone = [count * 4 * 32 for count in wanted.token_counts.tolist() if count * 4 * 32 >= LEAST_BYTES]
        assert len(alone) == 2 and client.shared_memory.byte_count >= 2 * 4 * sum(alone)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_numbers_come_as_over_grpc(kind: str, dtype: str, large: Server) -> None:
    with opened(kind, large.address) as client, Client(large.address) as plain:
        found, wanted = (one.embed([LONG, LONG], layers="all", dtype=dtype) for one in (client, plain))
        assert client.shared_memory.byte_count == LONG_BYTES
        for layer in wanted.layers:
            assert found.hidden_states[layer].dtype == wanted.hidden_states[layer].dtype
            assert np.array_equal(found.hidden_states[layer], wanted.hidden_states[layer])
        (result,) = client.embed_stream([LONG], layers=[2], dtype=dtype)
        assert np.array_equal(result.embedding.hidden_states[2][0], wanted.hidden_states[2][0])


def test_arrays_are_views_that_can_be_written_and_pickled(kind: str, large: Server) -> None:
    with opened(kind, large.address) as client:
        embedding = client.embed(LONG, layers="all")
        assert client.shared_memory.byte_count == LONG_BYTES
        (part, *_) = client.embed_layers(LONG)
        (result,) = client.embed_stream([LONG], layers="all")
        for rows in (embedding.ragged(2)[0], embedding.hidden_states[2], part.rows[0], result.embedding.ragged(0)[0]):
            assert rows.flags.writeable and rows.flags.c_contiguous and rows.flags.aligned and not rows.flags.owndata
            assert rows.ctypes.data % 64 == 0
            rows += 1
            again = pickle.loads(pickle.dumps(rows))
            assert np.array_equal(again, rows)


def held_by(rows: np.ndarray) -> object:
    """Returns what an array is a view of."""
    base: Any = rows
    while isinstance(base, np.ndarray):
        base = base.base
    return base


def test_nothing_is_copied_though_a_request_takes_many_batches(kind: str, large: Server) -> None:
    with opened(kind, large.address) as client:
        embedding = client.embed([LONG] * 20, layers="all")
        assert client.shared_memory.byte_count == 20 * LONG_BYTES
        assert all(held_by(rows) is not None for layer in embedding.layers for rows in embedding.ragged(layer))
    with Client(large.address) as plain:
        assert held_by(plain.embed(LONG).last_hidden_state) is None


# Room.


def test_a_full_segment_only_means_that_rows_travel(kind: str, small: Server) -> None:
    texts = [f"{n} " * 500 for n in range(10)]
    with opened(kind, small.address) as client, Client(small.address) as plain:
        wanted = [plain.embed(text, layers="all") for text in texts]
        held = [client.embed(text, layers="all") for text in texts]
        assert client.shared_memory.byte_count <= 2 * LONG_BYTES
        streamed = list(client.embed_stream(texts, layers="all"))
        for one, other, result in zip(held, wanted, streamed, strict=True):
            check(one, other)
            check(result.embedding, other)


def test_room_is_used_again_when_arrays_are_collected(kind: str, small: Server) -> None:
    with opened(kind, small.address) as client:
        for _ in range(20):
            embedding = client.embed(LONG, layers="all")
            del embedding
        assert client.shared_memory.byte_count == 20 * LONG_BYTES
        for _ in range(20):
            for part in client.embed_layers(LONG):
                del part
        assert client.shared_memory.byte_count == 40 * LONG_BYTES


def test_calls_that_are_broken_off_give_all_back(small: Server) -> None:
    finished = threading.Event()
    with Client(small.address, shared_memory=True) as client:
        for n in range(20):
            parts = client.embed_layers([LONG] * (1 + n % 3))
            assert next(parts).layer == 0
            if n % 2:
                finished.wait(0.05)  # Some calls are over for the server, with unread messages.
            parts.close()
            results = client.embed_stream([LONG] * 4, layers="all")
            assert next(results).index == 0
            results.close()

        def all_by_memory() -> bool:
            before = client.shared_memory.byte_count
            assert client.embed(LONG, layers="all").layers == (0, 1, 2, 3)
            assert client.embed(LONG, layers="all").layers == (0, 1, 2, 3)
            return client.shared_memory.byte_count - before == 2 * LONG_BYTES

        poll(all_by_memory)


# Ends.


def test_arrays_outlive_the_client_and_the_server(kind: str, tiny_folder: Path) -> None:
    server = Server(*flags(tiny_folder))
    try:
        with Client(server.address) as plain:
            wanted = plain.embed([LONG, "x"], layers="all")
        with opened(kind, server.address) as client:
            embedding = client.embed([LONG, "x"], layers="all")
            results = list(client.embed_stream([LONG], layers="all"))
            assert client.shared_memory.byte_count > 0
        check(embedding, wanted)
        server.signal(signal.SIGKILL)
        server.process.wait(WAIT_S)
        check(embedding, wanted)
        rows = results[0].embedding.ragged(3)[0]
        del results, embedding
        gc.collect()
        assert np.abs(rows - wanted.ragged(3)[0]).max() <= BOUND
    finally:
        ended(server)


def test_a_killed_client_leaves_nothing_with_the_server(large: Server) -> None:
    poll(lambda: not segment_count(large))
    with subprocess.Popen(
        [sys.executable, "-c", LEASE, large.address], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as client:
        assert client.stdout is not None and client.stdout.readline() == b"ready\n"
        assert segment_count(large) > 0
        client.kill()
    poll(lambda: not segment_count(large))


def test_a_client_that_is_never_closed_ends_with_its_process(large: Server) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LEASE, large.address],
        input="",
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ready\n", "")
    poll(lambda: not segment_count(large))


def test_a_server_stops_at_once_while_memory_is_shared_and_its_successor_shares_anew(
    kind: str, tiny_folder: Path
) -> None:
    first = Server(*flags(tiny_folder))
    try:
        with opened(kind, first.address) as client:
            held = client.embed(LONG, layers="all")
            before = client.shared_memory.byte_count
            started = time.monotonic()
            assert first.stop() == 0
            assert time.monotonic() - started < 10  # The grace is 30 s.
            with pytest.raises(UnavailableError):
                client.embed(LONG)
            with running(*flags(tiny_folder), "--port", first.address.rsplit(":", 1)[1]) as second:

                def by_memory_again() -> bool:
                    with contextlib.suppress(UnavailableError):
                        check(client.embed(LONG, layers="all"), held)
                    return client.shared_memory.byte_count > before

                poll(by_memory_again)
                assert second.address == first.address
    finally:
        ended(first)


def test_a_stream_goes_on_with_memory_of_a_restarted_server(tiny_folder: Path) -> None:
    server = Server(*flags(tiny_folder))
    back = threading.Event()
    came: list[Any] = []

    def items() -> Iterator[str]:
        for n in range(40):
            if n == 20:
                assert back.wait(WAIT_S)
            yield LONG

    try:
        with Client(server.address, shared_memory=True) as client:
            for result in client.embed_stream(items(), layers="all"):
                came.append(result.embedding.ragged(3)[0])
                if len(came) == 10:
                    server.kill()
                    before = client.shared_memory.byte_count
                    server = Server(*flags(tiny_folder), "--port", server.address.rsplit(":", 1)[1])
                    back.set()
            assert len(came) == 40 and client.shared_memory.byte_count - before >= 20 * LONG_BYTES
            assert all(np.abs(rows - came[0]).max() <= BOUND for rows in came)
            assert server.stop() == 0
    finally:
        back.set()
        ended(server)


# What cannot be had.


def test_a_server_that_shares_nothing_is_used_over_grpc_and_the_log_says_so_once(
    kind: str, tiny_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "layertap"), opened(kind, tiny_server.address) as client:
        for _ in range(3):
            assert client.embed(LONG, layers="all").hidden_states[0].shape == (1, 512, 32)
        assert client.shared_memory.byte_count == 0
    (record,) = caplog.records
    assert record.name == "layertap" and "--shared-memory-bytes" in record.getMessage()


@pytest.mark.one_process
def test_clients_above_the_most_get_bytes(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running(*flags(tiny_folder), "--max-shared-memory-call-count", "1") as server:
        with Client(server.address, shared_memory=True) as one, Client(server.address, shared_memory=True) as other:
            check(one.embed(LONG, layers="all"), other.embed(LONG, layers="all"))
            assert one.shared_memory.byte_count == LONG_BYTES and other.shared_memory.byte_count == 0
        assert "--max-shared-memory-call-count" in caplog.text


def test_memory_is_requested_only_if_the_client_wants_it(kind: str, large: Server) -> None:
    poll(lambda: not segment_count(large))
    with opened(kind, large.address, shared_memory=False) as client:
        client.embed(LONG, layers="all")
        assert not segment_count(large) and client.shared_memory.byte_count == 0


@pytest.mark.parametrize(
    "use",
    [
        pb.SharedMemoryUse(segment_id="unknown", call_number=1),
        pb.SharedMemoryUse(call_number=1),
        pb.SharedMemoryUse(segment_id="unknown", call_number=-1),
    ],
)
def test_a_segment_that_the_server_does_not_know_is_as_good_as_none(large: Server, use: pb.SharedMemoryUse) -> None:
    options = pb.EmbedOptions(outputs=[pb.Output(hidden_states=pb.HiddenStates())], shared_memory=use)
    request = pb.EmbedLayersRequest(inputs=[pb.Input(text=LONG)], options=options)
    with grpc.insecure_channel(large.address) as channel:
        messages = list(embedding_pb2_grpc.EmbeddingServiceStub(channel).EmbedLayers(request, timeout=WAIT_S))
    assert not any(message.HasField("shared_rows") for message in messages)
    assert sum(len(message.data) for message in messages) == LONG_BYTES // 4


def test_a_client_that_overwrites_its_segment_harms_no_other_client(large: Server, wanted: Embedding) -> None:
    options = pb.EmbedOptions(outputs=[pb.Output(hidden_states=pb.HiddenStates(all_layers=True))])
    stop = threading.Event()
    with grpc.insecure_channel(large.address) as channel:
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        lease = stub.ShareMemory(pb.ShareMemoryRequest())
        segment = next(lease)
        mapping = Mapping(segment, SharedMemory(wanted=True))
        options.shared_memory.CopyFrom(pb.SharedMemoryUse(segment_id=segment.segment_id, call_number=1))

        def scribble() -> None:
            random = np.random.default_rng(0)
            while not stop.is_set():
                mapping._bytes[:] = random.integers(0, 3, dtype=np.uint8)
                mapping._bytes[:65536] = random.integers(0, 256, 65536, dtype=np.uint8)

        thread = threading.Thread(target=scribble)
        thread.start()
        try:
            with Client(large.address, shared_memory=True) as client:
                for _ in range(5):
                    request = pb.EmbedLayersRequest(inputs=[pb.Input(text=LONG)] * 10, options=options)
                    spoilt = stub.EmbedLayers(request, timeout=WAIT_S)
                    check(client.embed(TEXTS, layers="all", pooling="mean"), wanted)
                    assert sum(message.frame.row_count for message in spoilt) == 10 * 4 * 512
        finally:
            stop.set()
            thread.join()
        lease.cancel()


# Unix sockets.


@pytest.mark.one_process
def test_a_unix_socket_carries_everything_and_a_killed_server_leaves_the_path_usable(
    kind: str, tiny_folder: Path, tmp_path: Path
) -> None:
    target = f"unix:{tmp_path}/layertap.sock"
    for number in (signal.SIGKILL, signal.SIGTERM):
        server = Server(*flags(tiny_folder), "--host", target)
        try:
            assert server.address == target
            with opened(kind, target) as client:
                first = client.embed([LONG, "x"], layers="all")
                assert client.shared_memory.byte_count > 0
                (result,) = client.embed_stream([LONG], layers="all")
                assert np.abs(result.embedding.ragged(2)[0] - first.ragged(2)[0]).max() <= BOUND
                assert client.embed("x", pooling="mean").pooled.shape == (1, 32)
            server.signal(number)
            assert server.process.wait(WAIT_S) == (0 if number == signal.SIGTERM else -number)
        finally:
            ended(server)


@pytest.mark.one_process
def test_a_path_that_is_taken_is_refused_in_one_line_and_stays_as_it_is(tiny_folder: Path, tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        command = [sys.executable, "-m", "layertap_server", *flags(tiny_folder), "--log-level", "error"]
        done = subprocess.run(
            [*command, "--host", f"unix:{path}"], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    file = tmp_path / "file"
    file.write_text("precious")
    assert "not a socket" in refused(file) and file.read_text() == "precious"
    assert re.search("cannot listen on unix:.*nowhere", refused(tmp_path / "nowhere" / "socket"))
    with running(*flags(tiny_folder), "--host", f"unix:{tmp_path}/taken") as server:
        assert "another server" in refused(tmp_path / "taken")
        with Client(server.address) as client:
            assert client.embed("x").layers == (3,)
