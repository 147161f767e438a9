"""Servers of several processes: one address, one log, one set of metrics, and no call lost when one of them dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from support import Server, faulty, forks, open_client, poll, running
from support.faulty import Demand

from layertap import AsyncClient, Client, InvalidArgumentError, UnavailableError
from layertap_server.cores import core_count
from layertap_server.testing import ServerProcess, running_server

WAIT_S = 60.0
SERVING = health_pb2.HealthCheckResponse.SERVING
SCRIPT = Path(faulty.__file__)


@pytest.fixture(scope="module")
def two(tiny_folder: Path) -> Iterator[Server]:
    flags = ("--device", "cpu", "--model-id", str(tiny_folder), "--processes", "2", "--metrics-port", "0")
    with running(*flags, "--log-format", "json", "--max-concurrent-call-count", "100") as server:
        yield server


@contextlib.contextmanager
def connections(server: Server, count: int) -> Iterator[list[Client]]:
    """Clients with a connection of their own each, which reach both processes."""
    with contextlib.ExitStack() as stack:
        options = [("grpc.use_local_subchannel_pool", 1)]
        yield [
            stack.enter_context(Client(server.address, options=[*options, ("layertap.test", n)])) for n in range(count)
        ]


def lines(server: Server) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.log.splitlines()]


def members(server: ServerProcess) -> dict[int, int]:
    """Returns the ids of the processes that serve, by their numbers."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    # The first is the process that the others are forked from.
    return dict(enumerate(sorted(map(int, children))[1:], start=1))


def metrics(url: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {(one.name, frozenset(one.labels.items())): one.value for family in families for one in family.samples}


def metrics_url(server: Server) -> str:
    assert server.process.stdout
    line = server.process.stdout.readline().decode()
    return line.rsplit(None, 1)[1]


def test_all_processes_answer_alike_and_their_calls_are_one_log_and_one_sum(two: Server) -> None:
    url = metrics_url(two)
    with connections(two, 24) as clients:
        found = [client.embed("I love Paris", layers="all", pooling="mean") for client in clients]
        infos = [client.model_info() for client in clients]
    for one in found:
        for layer in one.layers:
            assert one.hidden_states[layer].tobytes() == found[0].hidden_states[layer].tobytes()
    assert all(info == infos[0] for info in infos)
    assert infos[0].process_count == 2 and infos[0].limits.max_concurrent_call_count == 100
    poll(lambda: sum(one.get("method") == "EmbedLayers" for one in lines(two)) == 24)
    by_process = [one["process"] for one in lines(two) if one.get("method") == "EmbedLayers"]
    assert set(by_process) == {1, 2}
    assert {one["process"] for one in lines(two)} == {0, 1, 2}
    sums = metrics(url)
    started = ("layertap_request_started_total", frozenset({("method", "EmbedLayers")}))
    assert sums[started] == 24
    assert sums["layertap_serving", frozenset()] == 1
    assert sums["layertap_processes_serving", frozenset()] == sums["layertap_processes", frozenset()] == 2
    assert sums["layertap_output_limit_bytes", frozenset()] == 512 << 20
    assert sums["layertap_instances", frozenset()] == 2 * max(1, min(4, core_count() // 2))


def test_the_supervisor_has_no_torch_and_the_processes_share_the_weights() -> None:
    with running_server("--device", "cpu", "--processes", "2") as server:  # Not forked of a process that has torch.
        assert "libtorch" not in Path(f"/proc/{server.process.pid}/maps").read_text()
        for pid in members(server).values():
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            sizes = {name: int(kib) for name, kib in re.findall(r"^(\w+): +(\d+) kB", rollup, re.MULTILINE)}
            # The weights of the embedded model have 87 MiB; what is written to after the fork is less.
            assert sizes["Private_Dirty"] < 87 << 10 < sizes["Shared_Dirty"]


def test_cuda_is_set_up_in_each_process_after_the_fork_and_not_before(tiny_folder: Path) -> None:
    script = Path(__file__).parents[1] / "support" / "pretended_cuda.py"
    flags = ("--device", "cuda", "--dtype", "auto", "--processes", "2", "--model-id", str(tiny_folder))
    with running(*flags, script=script) as server:
        asked = {int(pid) for pid in re.findall(rb"^cuda: (\d+) ", server.log, re.MULTILINE)}
        serving = set(members(server).values())
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        forked_from = set(map(int, children)) - serving
        assert len(serving) == 2 and serving < asked
        assert not asked & {server.process.pid, *forked_from}
        assert len(asked) == 3  # One more chose the devices, and has ended.
        # A process times its device alone: both ask for it, then make their encoder, one after the other.
        steps = re.findall(rb"^(cuda|made): (\d+)(?: init)?$", server.log, re.MULTILINE)
        (_, first), _, (_, second), _ = steps
        assert steps == [(b"cuda", first), (b"made", first), (b"cuda", second), (b"made", second)]
        with Client(server.address) as client:
            assert client.embed("I love Paris").last_hidden_state.shape[2] == 32


def by_process(server: Server, method: str, since: int) -> Counter[int]:
    """Returns how many calls each process has answered, of those that the log has after so many lines."""
    answered = (one for one in lines(server)[since:] if (one.get("method"), one.get("code")) == (method, "OK"))
    return Counter(one["process"] for one in answered)


def test_a_long_stream_and_many_calls_at_once_meet_all_processes(kind: str, two: Server) -> None:
    texts = [f"text {n}" for n in range(3000)]
    with contextlib.closing(open_client(kind, two.address)) as client:
        since = len(lines(two))
        results = list(client.embed_stream(texts, pooling="mean"))
        assert [one.index for one in results] == list(range(3000))
        wanted = client.embed(texts[::50], pooling="mean").pooled
    assert np.abs(np.stack([one.embedding.pooled[0] for one in results[::50]]) - wanted).max() <= 2e-5
    poll(lambda: by_process(two, "EmbedStream", since) == {1: 1, 2: 1})
    counts = [one["text_count"] for one in lines(two)[since:] if one.get("method") == "EmbedStream"]
    assert sum(counts) == 3000 and min(counts) >= 500, counts


def test_threads_that_share_a_client_meet_all_processes(two: Server) -> None:
    since = len(lines(two))
    with Client(two.address) as client, ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda n: client.embed(f"text {n}", pooling="mean").pooled[0], range(320)))
    assert len(found) == 320
    poll(lambda: by_process(two, "Embed", since).total() == 320)
    counts = by_process(two, "Embed", since)
    assert min(counts[1], counts[2]) >= 80, counts


def test_tasks_that_share_a_client_meet_all_processes(two: Server) -> None:
    since = len(lines(two))

    async def ask() -> None:
        async with AsyncClient(two.address) as client:
            await asyncio.gather(*(client.embed(f"text {n}", pooling="mean") for n in range(50)))
            await asyncio.gather(*(client.embed(f"text {n}", pooling="mean") for n in range(50)))

    asyncio.run(ask())
    poll(lambda: by_process(two, "Embed", since).total() == 100)
    assert set(by_process(two, "Embed", since)) == {1, 2}


def test_a_client_told_to_have_one_connection_meets_one_process(two: Server) -> None:
    since = len(lines(two))
    with Client(two.address, connections=1) as client:
        assert len(list(client.embed_stream((f"text {n}" for n in range(3000)), pooling="mean"))) == 3000
    poll(lambda: by_process(two, "EmbedStream", since).total() == 1)
    with pytest.raises(InvalidArgumentError, match="connections is 0; pass a whole number from 1 to 256"):
        Client(two.address, connections=0)


@pytest.mark.heavy
@pytest.mark.parametrize("attempt", range(3))
def test_a_stream_of_20000_texts_survives_a_killed_process_of_four_and_others_notice_nothing(
    attempt: int, tiny_folder: Path
) -> None:
    texts = [f"text {n} of attempt {attempt}" for n in range(20_000)]
    with running("--device", "cpu", "--model-id", str(tiny_folder), "--processes", "4") as server:
        others, asked, done = ThreadPoolExecutor(4), [], threading.Event()

        def ask(n: int) -> int:
            """Calls one after the other, over a connection of its own, and returns how many were answered."""
            count = 0
            with connections(server, 1) as (client,):
                while not done.is_set():
                    assert client.embed(f"other {n}", pooling="mean", timeout_s=WAIT_S).pooled.shape == (1, 32)
                    count += 1
            return count

        with others, Client(server.address) as client:
            wanted = np.concatenate(
                [client.embed(texts[n : n + 1000], pooling="mean").pooled for n in range(0, 20_000, 1000)]
            )
            asked.extend(others.submit(ask, n) for n in range(4))
            try:
                found = []
                for result in client.embed_stream(iter(texts), pooling="mean"):
                    found.append(result)
                    if len(found) == 4000 * (attempt + 1):
                        os.kill(members(server)[attempt + 1], signal.SIGKILL)
            finally:
                done.set()
            assert all(one.result() > 10 for one in asked)
        assert [one.index for one in found] == list(range(20_000))
        assert np.abs(np.stack([one.embedding.pooled[0] for one in found]) - wanted).max() <= 2e-5


def test_a_killed_process_is_replaced_while_the_others_serve_and_its_counts_stay(tiny_folder: Path) -> None:
    flags = ("--device", "cpu", "--model-id", str(tiny_folder), "--processes", "2", "--metrics-port", "0")
    server = Server(*flags)
    try:
        url = metrics_url(server)
        handled = ("layertap_request_handled_total", frozenset({("method", "Embed"), ("code", "OK")}))
        with connections(server, 12) as clients:
            for client in clients:
                client.embed("a", pooling="mean")
            assert metrics(url)[handled] == 12
            before = members(server)
            os.kill(before[1], signal.SIGKILL)
            for client in clients:  # The SDK repeats what the dead process had not answered.
                client.embed("b", pooling="mean", timeout_s=WAIT_S)
            poll(lambda: metrics(url)["layertap_processes_serving", frozenset()] == 2)
            assert metrics(url)[handled] == 24
            assert metrics(url)["layertap_process_deaths_total", frozenset()] == 1
            assert len(set(members(server).values()) - set(before.values())) == 1
        assert server.stop() == 0
        assert b"ended by signal 9 and is replaced" in server.log
    finally:
        ended(server)


def test_the_third_death_within_a_minute_drains_the_server_and_ends_it_with_code_1(tiny_folder: Path) -> None:
    server = Server("--device", "cpu", "--model-id", str(tiny_folder), "--processes", "2")
    try:
        for death in range(3):
            poll(lambda: len(members(server)) == 2 and server.log.count(b"listens process") == 2 + death)  # noqa: B023
            os.kill(members(server)[1], signal.SIGKILL)
        assert server.process.wait(WAIT_S) == 1
        server.stop()
        assert b"the third death within 60 s" in server.log and b"Traceback" not in server.log
    finally:
        ended(server)


def test_the_system_kills_a_process_that_serves_before_the_one_that_has_the_model(two: Server) -> None:
    children = Path(f"/proc/{two.process.pid}/task/{two.process.pid}/children").read_text().split()
    scores = {
        pid: int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in (*map(int, children), two.process.pid)
    }
    serving = set(members(two).values())
    others = {score for pid, score in scores.items() if pid not in serving}
    assert len(serving) == 2 and all(scores[pid] > max(others) for pid in serving)


def test_a_process_that_cannot_start_again_ends_no_others_and_is_tried_again(tmp_path: Path, tiny_folder: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("alice " + 16 * "x" + "\n")
    tokens.chmod(0o600)
    flags = ("--device", "cpu", "--model-id", str(tiny_folder), "--processes", "2", "--token-file", str(tokens))
    with running(*flags) as server:
        tokens.write_text("")  # As a rotation does that is half done.
        poll(lambda: server.log.count(b"cannot be used, the old stays in force") == 2)
        os.kill(members(server)[1], signal.SIGKILL)
        poll(lambda: b"ended with exit code 1; it is tried again in 5 s, the others serve on" in server.log)
        with Client(server.address, token=16 * "x") as client:
            assert client.embed("a", pooling="mean", timeout_s=WAIT_S).pooled.shape == (1, 32)
        tokens.write_text("alice " + 16 * "x" + "\n")
        poll(lambda: server.log.count(b"listens process") == 3)


def test_a_model_that_has_changed_is_not_served_beside_the_old_one(tmp_path: Path, tiny_folder: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    with running("--device", "cpu", "--model-id", str(folder), "--processes", "2") as server:
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        (forked_from,) = set(map(int, children)) - set(members(server).values())
        weights = bytearray((folder / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (folder / "model.safetensors").write_bytes(weights)
        os.kill(forked_from, signal.SIGKILL)
        poll(lambda: b"cannot load the model: its files have changed" in server.log)
        with Client(server.address) as client:
            assert client.embed("a", pooling="mean", timeout_s=WAIT_S).pooled.shape == (1, 32)


def test_a_process_that_hangs_is_killed_and_replaced(tiny_folder: Path) -> None:
    flags = ("--device", "cpu", "--model-id", str(tiny_folder), "--processes", "2", "--instance-timeout-s", "4")
    with running(*flags) as server:
        os.kill(members(server)[2], signal.SIGSTOP)
        poll(lambda: server.log.count(b"listens process") == 3)
        assert b"process 2 does not answer for 4 s and is killed" in server.log
        assert b"process 1 does not" not in server.log


def test_a_process_whose_engine_fails_is_replaced_and_its_callers_get_a_hint(tiny_folder: Path) -> None:
    flags = ("--device", "cpu", "--model-id", str(tiny_folder), "--processes", "2", "--instances", "1")
    server = Server(*flags, script=SCRIPT)
    try:
        with Client(server.address, retries=0) as client, pytest.raises(UnavailableError) as caught:
            client.embed([[101, int(Demand.DEVICE_LOST), 2293, 102]], layers="all")
        assert caught.value.retry_after_s is not None
        with Client(server.address) as client:
            assert client.embed("again", layers="all").layers == (0, 1, 2, 3)
        poll(lambda: b"with exit code 1 and is replaced" in server.log)
        poll(lambda: server.log.count(b"listens process") == 3)
        assert server.stop() == 0
    finally:
        ended(server)


def test_a_caller_in_the_middle_of_layers_gets_a_hint_when_its_process_is_killed(tiny_folder: Path) -> None:
    flags = ("--device", "cpu", "--model-id", str(tiny_folder), "--processes", "2")
    server = Server(*flags, script=SCRIPT)
    try:
        with Client(server.address) as client:
            layers = client.embed_layers([[101, int(Demand.STUCK), 2293, 102]])
            assert next(layers).layer == 0
            *_, number = re.findall(rb"encoding 1 texts process=(\d)", server.log)  # The others warm up.
            os.kill(members(server)[int(number)], signal.SIGKILL)
            with pytest.raises(UnavailableError, match=f"the connection to {server.address} broke") as caught:
                next(layers)
            assert caught.value.retry_after_s == 0.1
            assert client.embed("again", layers="all", timeout_s=WAIT_S).layers == (0, 1, 2, 3)
    finally:
        ended(server)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_all_processes(number: signal.Signals, tiny_folder: Path) -> None:
    server = Server("--device", "cpu", "--model-id", str(tiny_folder), "--processes", "2")
    try:
        with connections(server, 8) as clients, grpc.insecure_channel(server.address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
            assert next(watch).status == SERVING
            streams = [client.embed_layers(["paris " * 500] * 30, layers="all") for client in clients]
            first = [next(stream) for stream in streams]
            pids = members(server).values()
            for pid in (server.process.pid, *pids):  # As a terminal does.
                os.kill(pid, number)
            assert next(watch).status != SERVING
            counts = [
                len(one.texts) + sum(len(rows.texts) for rows in stream)
                for one, stream in zip(first, streams, strict=True)
            ]
            assert counts == [30 * 4] * 8
            watch.cancel()
        assert server.process.wait(WAIT_S) == 0
        server.stop()
        assert server.log.count(b"server: stopped process=") == 2
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    finally:
        ended(server)


def test_no_process_outlives_a_killed_supervisor(tiny_folder: Path) -> None:
    server = Server("--device", "cpu", "--model-id", str(tiny_folder), "--processes", "2")
    try:
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        assert len(children) == 3
        server.kill()
        poll(lambda: all(ended_or_zombie(int(pid)) for pid in children))
    finally:
        ended(server)


def ended_or_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_model_loads_ends_all(number: signal.Signals, tiny_folder: Path) -> None:
    arguments = ["-m", "layertap_server", "--port", "0", "--device", "cpu", "--model-id", str(tiny_folder)]
    process = forks.start([*arguments, "--processes", "2"], dict(os.environ))
    assert process is not None
    with process.stdout, process.stderr:
        assert any(b"found the model" in line for line in process.stderr)
        process.send_signal(number)
        assert process.wait(WAIT_S) == (0 if number == signal.SIGTERM else 130)
        assert b"Traceback" not in process.stderr.read() and not process.stdout.read()


@pytest.mark.parametrize(
    ("flags", "code", "error"),
    [
        (("--host", "unix:/tmp/x.sock"), 2, b"--host is a unix socket, which the system does not share"),
        (("--model-id", "./missing"), 2, b"--model-id names a folder that does not exist"),
        (("--max-queue-text-count", "1500"), 2, b"shared out to 2 processes, --max-queue-text-count is 750"),
        (
            ("--max-output-bytes", "300000", "--max-call-output-bytes", "300000"),
            2,
            b"shared out to 2 processes, --max-output-bytes is 150000, but one longest text",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    flags: tuple[str, ...], code: int, error: bytes, tiny_folder: Path
) -> None:
    arguments = ["-m", "layertap_server", "--port", "0", "--device", "cpu", "--model-id", str(tiny_folder)]
    process = forks.start([*arguments, "--processes", "2", "--log-level", "error", *flags], dict(os.environ))
    assert process is not None
    with process.stdout, process.stderr:
        assert process.wait(WAIT_S) == code
        printed = process.stderr.read()
        assert error in printed and printed.count(b"\n") == 1


def test_a_taken_port_is_refused(two: Server) -> None:
    port = two.address.rsplit(":", 1)[1]
    for flags in (("--processes", "2"), ()):
        process = forks.start(["-m", "layertap_server", "--port", port, *flags], dict(os.environ))
        assert process is not None
        with process.stdout, process.stderr:
            assert process.wait(WAIT_S) == 2
            assert b"the port is taken" in process.stderr.read()


def test_http_and_grpc_listen_in_all_processes(tiny_folder: Path) -> None:
    flags = ("--device", "cpu", "--model-id", str(tiny_folder), "--processes", "2", "--http-port", "0")
    with running(*flags) as server:
        url = metrics_url(server).removesuffix("/v1")
        for _ in range(12):
            request = urllib.request.Request(
                f"{url}/v1/embeddings",
                json.dumps({"model": tiny_folder.name, "input": "hi"}).encode(),
                {"content-type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
                assert len(json.load(answer)["data"][0]["embedding"]) == 32
        by_process = re.findall(rb"process=(\d) .*?POST /v1/embeddings", server.log)
        assert set(by_process) == {b"1", b"2"}


def ended(server: Server) -> None:
    if server.process.poll() is None:
        server.kill()


STOPPED = """
import asyncio, os, signal, sys, types
from layertap_server.app.processes import fork_server

async def main():
    fork_server._FORK_TIMEOUT_S = 0.2
    server = fork_server.ForkServer(lambda: types.SimpleNamespace(fingerprint="f"), lambda *_: os._exit(0))
    await server.loaded()
    server.child.signal(signal.SIGSTOP)
    try:
        server.fork(1)
    except fork_server.ForkServerLostError:
        sys.exit(-await asyncio.wait_for(server.child.ended(), 30))

asyncio.run(main())
"""


def test_a_fork_server_that_does_not_answer_is_ended_so_that_another_is_started() -> None:
    assert subprocess.run([sys.executable, "-c", STOPPED], timeout=WAIT_S).returncode == signal.SIGKILL
