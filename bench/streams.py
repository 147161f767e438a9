"""Long streams and what may befall them, each in small or large: memory, readers that stop, crashes, bad items, health.

- soak: how far client and server grow while short texts run through one `embed_stream`, pooled.
- stalled: a caller asks for all layers of many texts and stops reading after the first; how far the server grows, and
  how fast it serves another caller meanwhile.
- killed: the server is killed and started again on its port while texts run through one `embed_stream`.
- bad: one item in each hundred cannot be embedded.
- health: how soon health checks are answered while all layers stream.

`killed` runs a model, the others a server whose encoder costs nothing, so that streams are all there is. Each scenario
is a process of its own. What comes back wrong ends it; figures are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import psutil
import servers
from texts import workload

from layertap import Client
from layertap.results.streamed import StreamResult

VOCABULARY = 30522
POLL_S = 0.02


def short_texts(count: int) -> Iterator[str]:
    """Yields short texts, none like another, without holding them."""
    known, _ = workload("short", 5000)
    return (f"{known[n % len(known)]} {n}" for n in range(count))


def expect(right: bool, what: str) -> None:
    if not right:
        raise SystemExit(f"wrong: {what}")


# Soak.


def soak(arguments: argparse.Namespace) -> None:
    count, first = arguments.soak_texts, arguments.soak_first
    own = psutil.Process()
    begun: tuple[float, float] | None = None
    most = [0.0, 0.0]
    now = (0.0, 0.0)
    started = time.perf_counter()
    with servers.stand_in() as server, Client(server.address) as client:
        for n, result in enumerate(client.embed_stream(short_texts(count), pooling="mean")):
            expect(result.index == n and result.error is None, f"result {n} is {result.index}, {result.error}")
            if n + 1 == first or (begun and (n + 1) % 500 == 0) or n + 1 == count:
                now = own.memory_info().rss / 2**20, server.memory_mb
                begun = begun or now
                most = [max(pair) for pair in zip(most, now, strict=True)]
        seconds = time.perf_counter() - started
    expect(begun is not None and n + 1 == count, f"{n + 1} results of {count}")
    assert begun is not None
    print(f"soak: {count} texts through one embed_stream in {seconds:.1f} s, {count / seconds:.0f} texts/s")
    for who, at_first, at_end, at_most in zip(("client", "server"), begun, now, most, strict=True):
        print(
            f"  {who}: {at_first:.0f} MB after the first {first}, then at most {at_most - at_first:+.1f} MB, "
            f"at the end {at_end - at_first:+.1f} MB"
        )


# A reader that stops.


class Peak:
    """The most memory of a server while the block runs, in MB."""

    def __init__(self, server: servers.Server) -> None:
        self.memory_mb = server.memory_mb
        self._server = server
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._run)

    def __enter__(self) -> Peak:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watch.join()

    def _run(self) -> None:
        while not self._ended.wait(POLL_S):
            self.memory_mb = max(self.memory_mb, self._server.memory_mb)


def _stop_reading(address: str, count: int, ends: Any) -> None:
    """Reads one result and holds on to the rest, in a process of its own, until told to end."""
    text, _ = workload("uniform", 1)
    with (
        Client(address) as client,
        contextlib.closing(
            client.embed_stream(itertools.repeat(text[0], count), layers="all", truncation="right", max_length=128)
        ) as results,
    ):
        next(results)
        ends.send("stopped reading")
        ends.recv()


def _calls_a_second(client: Client, seconds: float) -> float:
    started = time.perf_counter()
    for n in itertools.count(1):
        client.embed("I love Paris", pooling="mean")
        if (taken := time.perf_counter() - started) >= seconds:
            return n / taken
    raise AssertionError


def _texts_a_second(client: Client, seconds: float) -> float:
    """All layers of mixed texts in bulk."""
    texts, max_length = workload("mixed", 1000)
    started = time.perf_counter()
    stream = client.embed_stream(itertools.cycle(texts), layers="all", truncation="right", max_length=max_length)
    with contextlib.closing(stream) as results:
        for n, _ in enumerate(results, 1):
            if (taken := time.perf_counter() - started) >= seconds:
                return n / taken
    raise AssertionError


def stalled(arguments: argparse.Namespace) -> None:
    spawn = multiprocessing.get_context("spawn")
    kinds = (("one short text a call", _calls_a_second), ("all layers in bulk", _texts_a_second))
    ratios: dict[str, list[float]] = {name: [] for name, _ in kinds}
    growths, heights = [], []
    timeout_s = str(4 * arguments.stalled_seconds + 60)
    with servers.stand_in("--stall-timeout-s", timeout_s) as server, Client(server.address) as client:
        for _, speed in kinds:
            speed(client, arguments.stalled_seconds / 2)
        for _ in range(arguments.stalled_rounds):
            with Peak(server) as before:
                speeds = {name: speed(client, arguments.stalled_seconds) for name, speed in kinds}
            stood = server.memory_mb
            ours, theirs = spawn.Pipe()
            reader = spawn.Process(
                target=_stop_reading, args=(server.address, arguments.stalled_texts, theirs), daemon=True
            )
            reader.start()
            with Peak(server) as during:
                ours.recv()
                time.sleep(1)
                for name, speed in kinds:
                    ratios[name].append(speed(client, arguments.stalled_seconds) / speeds[name])
            ours.send("end")
            reader.join(timeout=30)
            growths.append(during.memory_mb - stood)
            heights.append(during.memory_mb - before.memory_mb)
    print(
        f"stalled: a reader stops after the first of {arguments.stalled_texts} texts of 128 tokens, all layers, "
        f"{arguments.stalled_rounds} rounds"
    )
    print(
        f"  server: at most {max(growths):+.0f} MB over where it stood, "
        f"{max(heights):+.0f} MB over its peak with the other caller alone"
    )
    for name, found in ratios.items():
        print(f"  another caller, {name}: {statistics.median(found):.3f} of its speed before (least {min(found):.3f})")


# A server that is killed.


class Restarted:
    """A server with a model that can be killed and comes back on the same port.

    Attributes:
        start_s: How long the longest start took, in seconds.
    """

    def __init__(self, flags: list[str]) -> None:
        self._flags = flags
        self._server = servers.real("--port", "0", *flags)
        self._starting: threading.Thread | None = None
        self.address = self._server.address
        self.start_s = 0.0

    def kill(self) -> None:
        """Kills it and starts it again, without waiting for that."""
        self._settle()
        self._server.kill()
        self._starting = threading.Thread(target=self._start)
        self._starting.start()

    def close(self) -> None:
        self._settle()
        self._server.stop()

    def _start(self) -> None:
        started = time.perf_counter()
        self._server = servers.real("--port", self.address.rsplit(":", 1)[1], *self._flags)
        self.start_s = max(self.start_s, time.perf_counter() - started)

    def _settle(self) -> None:
        if self._starting is not None:
            self._starting.join()


def killed(arguments: argparse.Namespace) -> None:
    count, kills = arguments.killed_texts, arguments.kills
    known, _ = workload("short", 200)
    at = {count * k // (kills + 1) for k in range(1, kills + 1)}
    came, furthest, longest = 0, 0.0, 0.0
    server = Restarted(["--model-id", arguments.model_id] if arguments.model_id else [])
    with contextlib.closing(server), Client(server.address) as client:
        wanted = [client.embed(text, pooling="mean").pooled[0] for text in known]
        started = last = time.perf_counter()
        texts = (known[n % len(known)] for n in range(count))
        for result in client.embed_stream(texts, pooling="mean", reconnect_timeout_s=120):
            longest = max(longest, time.perf_counter() - last)
            expect(result.index == came, f"result {came} is that of item {result.index}")
            expect(result.error is None, f"item {came}: {result.error}")
            off = float(np.abs(result.embedding.pooled[0] - wanted[came % len(known)]).max())
            furthest = max(furthest, off)
            expect(off < 1e-4, f"item {came} is off by {off}")
            came += 1
            if came in at:
                server.kill()
            last = time.perf_counter()
        seconds = time.perf_counter() - started
    expect(came == count, f"{came} results of {count}")
    print(
        f"killed: {kills} kills in {count} texts, {came} right results, each once, in order, largest difference "
        f"{furthest:.1e}, in {seconds:.1f} s; the longest wait for a result {longest:.1f} s, the longest start of "
        f"the server {server.start_s:.1f} s"
    )


# Bad items.


def bad(arguments: argparse.Namespace) -> None:
    count = arguments.bad_texts
    faults: tuple[Any, ...] = ("word " * 600, [101, VOCABULARY, 102])

    def items() -> Iterator[Any]:
        for n, text in enumerate(short_texts(count)):
            yield faults[n // 100 % len(faults)] if n % 100 == 42 else text

    good, refused = 0, list[StreamResult]()
    with servers.stand_in() as server, Client(server.address) as client:
        for n, result in enumerate(client.embed_stream(items(), pooling="mean")):
            expect(result.index == n, f"result {n} is that of item {result.index}")
            expect((result.error is not None) == (n % 100 == 42), f"item {n}: {result.error}")
            if result.error is None:
                good += 1
            else:
                refused.append(result)
    named = sum(bool(re.search(rf"\bitem {one.index}\b", str(one.error))) for one in refused)
    kinds = sorted({type(one.error).__name__ for one in refused})
    print(
        f"bad: {count} items, {good} results, {len(refused)} in-band errors ({', '.join(kinds)}), {named} naming theirs"
    )
    expect(good + len(refused) == count and named == len(refused), "an item is missing, or an error does not name it")


# Health.


def _probe(address: str, interval_s: float, ends: Any) -> None:
    """Checks health again and again, in a process of its own, until told to end; tells when and how long each took."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        stub.Check(health_pb2.HealthCheckRequest())
        ends.send("ready")
        probes = []
        while not ends.poll(interval_s):
            started = time.perf_counter()
            answer = stub.Check(health_pb2.HealthCheckRequest())
            probes.append((started, time.perf_counter() - started))
            expect(answer.status == health_pb2.HealthCheckResponse.SERVING, f"health is {answer.status}")
        ends.send(probes)


def health(arguments: argparse.Namespace) -> None:
    """All layers of 512 tokens are 20 MB a text."""
    ids = [[101, *([2293] * 510), 102]] * max(1, round(arguments.health_bytes / (512 * 13 * 768 * 4)))
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    spans: dict[str, list[tuple[float, float]]] = {}
    came: dict[str, int] = {}
    with servers.stand_in("--shared-memory-bytes", str(512 << 20)) as server:
        prober = spawn.Process(target=_probe, args=(server.address, arguments.health_interval_s, theirs), daemon=True)
        prober.start()
        ours.recv()
        spans["idle"] = [(time.perf_counter(), time.perf_counter() + 2)]
        time.sleep(2)
        for name, shared in (("bytes", False), ("shared memory", True)):
            spans[name], came[name] = [], 0
            with Client(server.address, shared_memory=shared) as client:
                for _ in range(arguments.health_answers):
                    started = time.perf_counter()
                    came[name] += sum(rows.nbytes for part in client.embed_layers(ids) for rows in part.rows)
                    spans[name].append((started, time.perf_counter()))
        ours.send("end")
        probes = ours.recv()
        prober.join(timeout=30)
    print(
        f"health: a check {arguments.health_interval_s * 1e3:.0f} ms after the last, "
        f"while {arguments.health_answers} answers stream"
    )
    for name, stretches in spans.items():
        taken = [took for at, took in probes for begin, end in stretches if begin - took < at < end]
        if not taken:
            print(f"  {name}: too short for a check")
            continue
        shown = [f"{what} {np.percentile(taken, q) * 1e3:.1f} ms" for what, q in (("p50", 50), ("p99", 99))]
        seconds = sum(end - begin for begin, end in stretches)
        size = f"{came[name] / 1e9:.2f} GB in {seconds:.1f} s, " if name in came else ""
        print(f"  {name}: {size}{len(taken)} checks, {', '.join(shown)}, most {max(taken) * 1e3:.1f} ms")


SCENARIOS: dict[str, Callable[[argparse.Namespace], None]] = {
    "soak": soak,
    "stalled": stalled,
    "killed": killed,
    "bad": bad,
    "health": health,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"a comma list of {', '.join(SCENARIOS)}")
    parser.add_argument("--soak-texts", type=int, default=200_000)
    parser.add_argument("--soak-first", type=int, default=10_000, help="texts before growth counts")
    parser.add_argument("--stalled-texts", type=int, default=10_000)
    parser.add_argument("--stalled-seconds", type=float, default=6.0, help="of each measurement of another caller")
    parser.add_argument("--stalled-rounds", type=int, default=3)
    parser.add_argument("--killed-texts", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=3, help="an item that sees three of them is answered UNAVAILABLE")
    parser.add_argument("--model-id", default="", help="the model of killed; empty: the embedded one")
    parser.add_argument("--bad-texts", type=int, default=20_000)
    parser.add_argument("--health-bytes", type=float, default=1e9, help="of one answer")
    parser.add_argument("--health-answers", type=int, default=5)
    parser.add_argument("--health-interval-s", type=float, default=0.005)
    arguments = parser.parse_args()
    chosen = list(filter(None, arguments.only.split(","))) or list(SCENARIOS)
    if len(chosen) == 1:
        SCENARIOS[chosen[0]](arguments)
        return
    codes = [subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", name]).returncode for name in chosen]
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
