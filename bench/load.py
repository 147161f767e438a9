"""What a server does under more load than it can bear: its own service and queue around an engine of known speed.

The engine is the stand-in's, one instance whose batches of so many tokens take a fixed time, so that the capacity is
known and gRPC's cost for a call hides nothing. Each generator is a process of its own and tells how much CPU it took:
one that is near a whole core measures itself. Scenarios:

overload  ten times the capacity from many connections: how much of the capacity is answered, how soon the others are
          refused, how soon health answers, whether memory stays.
flood     a client who sends all it can, beside one who only fills the server: what is left to that one.
mixed     all kinds of calls with cancels, disconnects, refusals and deadlines: drift of memory, threads, descriptors.
metrics   the server's counters against what the generators have counted, after the same mix.
hostile   callers who try to take the server's memory or time, beside one who makes short calls: see hostile.py.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import multiprocessing
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import hostile
import numpy as np
import psutil
import servers

from layertap.v1 import embedding_pb2 as pb

SERVICE = "/layertap.v1.EmbeddingService/"
TEXTS, TOKENS = 8, 16
"""Of one request."""
BATCH_REQUESTS = 8
"""Requests that fill a batch."""
KINDS = ("embed", "embed", "layers", "layers", "stream", "bad", "info", "leave", "leave", "late", "reconnect")
SPAWN = multiprocessing.get_context("spawn")


def request_of(kind: Any, outputs: list[pb.Output]) -> bytes:
    ids = pb.TokenIds(input_ids=[101, *([2293] * (TOKENS - 2)), 102])
    return kind(inputs=TEXTS * [pb.Input(token_ids=ids)], options=pb.EmbedOptions(outputs=outputs)).SerializeToString()


POOLED = [pb.Output(pooled_vectors=pb.PooledVectors())]
EMBED = request_of(pb.EmbedRequest, POOLED)
ALL_LAYERS = request_of(pb.EmbedLayersRequest, [pb.Output(hidden_states=pb.HiddenStates(all_layers=True))])


@dataclasses.dataclass(slots=True)
class Tally:
    """What one generator has seen: how often each RPC ended with each code, how long that took, and its own CPU.

    Attributes:
        codes: Calls by RPC and code.
        times_s: How long each took, by code.
        cpu: Cores that the generator kept busy.
        seconds: From its first call to its last answer.
    """

    codes: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    times_s: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    cpu: float = 0.0
    seconds: float = 0.0

    def note(self, rpc: str, code: str, taken_s: float) -> None:
        self.codes[rpc, code] += 1
        self.times_s.setdefault(code, []).append(taken_s)

    def add(self, other: Tally) -> None:
        self.codes.update(other.codes)
        for code, times_s in other.times_s.items():
            self.times_s.setdefault(code, []).extend(times_s)
        self.cpu, self.seconds = max(self.cpu, other.cpu), max(self.seconds, other.seconds)

    def count(self, code: str) -> int:
        return sum(count for (_, own), count in self.codes.items() if own == code)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one generator is to do."""

    address: str
    seconds: float
    connections: int = 4
    calls_a_second: float = 0.0
    """0: each connection calls again as soon as it has its answer."""
    at_once: int = 1
    """Calls of a connection at once, where it waits for answers."""
    mixed: bool = False
    token: str = ""
    seed: int = 0


def generate(load: Load, ends: Any) -> None:
    """Runs one generator; says "ready", waits for leave, and sends its tally."""
    ends.send("ready")
    ends.recv()
    tally = Tally()
    started, used = time.perf_counter(), time.process_time()
    asyncio.run(_generate(load, tally))
    tally.seconds = time.perf_counter() - started
    tally.cpu = (time.process_time() - used) / tally.seconds
    ends.send(tally)


async def _generate(load: Load, tally: Tally) -> None:
    ends_at = time.perf_counter() + load.seconds
    chance = random.Random(load.seed)
    metadata = [("authorization", f"Bearer {load.token}")] if load.token else []
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(load.address, options=options) for _ in range(load.connections)]
    call = _mixed if load.mixed else _embed
    tasks: set[asyncio.Task[None]] = set()
    try:
        if load.calls_a_second:
            for n, channel in enumerate(itertools.cycle(channels)):
                at = ends_at - load.seconds + n / load.calls_a_second
                if at >= ends_at:
                    break
                await asyncio.sleep(max(0.0, at - time.perf_counter()))
                task = asyncio.create_task(call(channel, load, metadata, tally, chance))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        else:

            async def again_and_again(channel: grpc.aio.Channel) -> None:
                while time.perf_counter() < ends_at:
                    await call(channel, load, metadata, tally, chance)

            tasks.update(asyncio.create_task(again_and_again(one)) for one in channels * load.at_once)
        await asyncio.gather(*tasks)
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))


async def _embed(channel: grpc.aio.Channel, load: Load, metadata: Any, tally: Tally, chance: random.Random) -> None:
    call = channel.unary_unary(SERVICE + "Embed", None, None)(EMBED, timeout=30, metadata=metadata)
    await _note("Embed", call, tally)


async def _note(rpc: str, call: Any, tally: Tally) -> None:
    started = time.perf_counter()
    code = (await call.code()).name
    tally.note(rpc, code, time.perf_counter() - started)
    if code == "RESOURCE_EXHAUSTED":
        await asyncio.sleep(0.05)  # Far sooner than the server asks for, but not at once.


async def _mixed(channel: grpc.aio.Channel, load: Load, metadata: Any, tally: Tally, chance: random.Random) -> None:
    """Makes one call of any kind; some callers leave early, some have little time, some send what is refused."""
    kind = chance.choice(KINDS)
    if kind == "embed":
        await _embed(channel, load, metadata, tally, chance)
    elif kind == "bad":
        call = channel.unary_unary(SERVICE + "Embed", None, None)(chance.randbytes(40), timeout=30, metadata=metadata)
        await _note("Embed", call, tally)
    elif kind == "info":
        call = channel.unary_unary(SERVICE + "GetModelInfo", None, None)(b"", timeout=30, metadata=metadata)
        await _note("GetModelInfo", call, tally)
    elif kind == "stream":
        opening = pb.EmbedStreamRequest(options=pb.StreamOptions(options=pb.EmbedOptions(outputs=POOLED)))
        inputs = pb.EmbedStreamRequest()
        for n, one in enumerate(pb.EmbedRequest.FromString(EMBED).inputs):
            inputs.inputs.inputs.append(pb.StreamInput(id=n, input=one))
        messages = [opening.SerializeToString(), inputs.SerializeToString()]
        call = channel.stream_stream(SERVICE + "EmbedStream", None, None)(iter(messages), timeout=30, metadata=metadata)
        await _drain("EmbedStream", call, tally, None)
    else:
        timeout_s = 0.05 if kind == "late" else 30
        own = grpc.aio.insecure_channel(load.address) if kind == "reconnect" else channel
        call = own.unary_stream(SERVICE + "EmbedLayers", None, None)(ALL_LAYERS, timeout=timeout_s, metadata=metadata)
        await _drain("EmbedLayers", call, tally, chance.randrange(3) if kind in ("leave", "reconnect") else None)
        if kind == "reconnect":
            await own.close()


async def _drain(rpc: str, call: Any, tally: Tally, leaves_after: int | None) -> None:
    started, came = time.perf_counter(), 0
    try:
        while came != leaves_after and await call.read() is not grpc.aio.EOF:
            came += 1
    except grpc.RpcError:
        pass
    if came == leaves_after:
        call.cancel()
    tally.note(rpc, (await call.code()).name, time.perf_counter() - started)


@contextmanager
def generators(loads: list[Load]) -> Iterator[Callable[[], list[Tally]]]:
    """Starts generators; yields what lets them go and waits for their tallies."""
    pipes, processes = [], []
    for load in loads:
        ours, theirs = SPAWN.Pipe()
        process = SPAWN.Process(target=generate, args=(load, theirs), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    for pipe in pipes:
        pipe.recv()

    def go() -> list[Tally]:
        for pipe in pipes:
            pipe.send("go")
        return [pipe.recv() for pipe in pipes]

    yield go
    for process in processes:
        process.join(timeout=30)


def probe_health(address: str, ends: Any) -> None:
    """Checks health twenty times a second, in a process of its own, until told to end; sends how long each took."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        stub.Check(health_pb2.HealthCheckRequest(), timeout=30)
        ends.send("ready")
        times_s = []
        while not ends.poll(0.05):
            started = time.perf_counter()
            stub.Check(health_pb2.HealthCheckRequest(), timeout=30)
            times_s.append(time.perf_counter() - started)
        ends.send(times_s)


@contextmanager
def health(address: str) -> Iterator[list[float]]:
    """Probes health while the block runs; the list is filled at its end."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=probe_health, args=(address, theirs), daemon=True)
    process.start()
    ours.recv()
    times_s: list[float] = []
    yield times_s
    ours.send("end")
    times_s.extend(ours.recv())
    process.join(timeout=30)


class Watch:
    """The server's memory, threads and descriptors."""

    def __init__(self, server: servers.Server) -> None:
        self._process = psutil.Process(server.process_id)

    def look(self) -> tuple[float, int, int]:
        return self._process.memory_info().rss / 2**20, self._process.num_threads(), self._process.num_fds()


def p99_ms(times_s: list[float]) -> str:
    return f"{np.percentile(times_s, 99) * 1e3:.0f} ms" if times_s else "none"


def flags(arguments: argparse.Namespace, *more: str) -> list[str]:
    """One instance with batches of known size and time, and a queue of four batches."""
    return [
        *("--instances", "1", "--max-batch-tokens", str(BATCH_REQUESTS * TEXTS * TOKENS), "--min-share-tokens", "1"),
        *("--batch-s", str(arguments.batch_s), "--max-text-count", str(TEXTS)),
        *("--max-queue-text-count", str(4 * BATCH_REQUESTS * TEXTS), *more),
    ]


def overload(arguments: argparse.Namespace) -> None:
    capacity = BATCH_REQUESTS / arguments.batch_s
    with servers.stand_in(*flags(arguments)) as server, health(server.address) as probes:
        warm = Load(address=server.address, seconds=3, at_once=BATCH_REQUESTS)
        with generators([warm]) as go:
            go()
        begun = Watch(server).look()
        rate = 10 * capacity / arguments.generators
        loads = [
            Load(address=server.address, seconds=arguments.seconds, connections=32, calls_a_second=rate, seed=n)
            for n in range(arguments.generators)
        ]
        with generators(loads) as go:
            tallies = go()
        ended = Watch(server).look()
    total = Tally()
    for tally in tallies:
        total.add(tally)
    goodput = total.count("OK") / total.seconds
    print(
        f"overload: {total.codes.total() / arguments.seconds:.0f} calls/s offered for {arguments.seconds:.0f} s over "
        f"{32 * arguments.generators} connections, capacity {capacity:.0f}"
    )
    print(f"  answered {goodput:.1f} a second, {goodput / capacity:.3f} of the capacity; {dict(total.codes)}")
    print(f"  refusals p99 {p99_ms(total.times_s.get('RESOURCE_EXHAUSTED', []))}, health p99 {p99_ms(probes)}")
    print(f"  server: {begun[0]:.0f} MB before, {ended[0]:.0f} MB after; generators took {total.cpu:.2f} cores")


def flood(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokens = {name: f"{name}-{'x' * 20}" for name in ("polite", "flooding")}
        file = Path(folder) / "tokens"
        file.write_text("".join(f"{name} {token}\n" for name, token in tokens.items()))
        file.chmod(0o600)
        with servers.stand_in(*flags(arguments, "--token-file", str(file))) as server:

            def load(**more: Any) -> Load:
                return Load(address=server.address, seconds=arguments.seconds, **more)

            polite = load(token=tokens["polite"], connections=4, at_once=BATCH_REQUESTS // 2)
            rate = 10 * BATCH_REQUESTS / arguments.batch_s / arguments.generators
            others = [
                load(token=tokens["flooding"], connections=32, calls_a_second=rate, seed=n)
                for n in range(arguments.generators)
            ]
            with generators([polite]) as go:
                (alone,) = go()
            with generators([polite, *others]) as go:
                beside, *flooding = go()
    ratio = beside.count("OK") / beside.seconds / (alone.count("OK") / alone.seconds)
    print(
        f"flood: the polite one had {alone.count('OK') / alone.seconds:.1f} answers a second alone, "
        f"{beside.count('OK') / beside.seconds:.1f} beside the flood: {ratio:.3f}; {dict(beside.codes)}"
    )
    print(f"  the flood: {dict(sum((one.codes for one in flooding), Counter()))}")
    print(f"  generators took at most {max(one.cpu for one in (alone, beside, *flooding)):.2f} cores")


def mixed(arguments: argparse.Namespace) -> None:
    with servers.stand_in(*flags(arguments, "--stall-timeout-s", "5")) as server:
        watch, looks = Watch(server), []
        rounds = 10
        seconds = arguments.mixed_seconds / rounds
        total = Tally()
        for n in range(rounds):
            loads = [
                Load(address=server.address, seconds=seconds, connections=12, mixed=True, seed=100 * n + k)
                for k in range(arguments.generators)
            ]
            with generators(loads) as go:
                for tally in go():
                    total.add(tally)
            time.sleep(1)  # What the last ones left behind has ended.
            looks.append(watch.look())
    warm, end = looks[1], looks[-1]
    print(f"mixed: {total.codes.total()} calls in {arguments.mixed_seconds:.0f} s: {dict(total.codes)}")
    print(
        f"  server: {warm[0]:.1f} MB after two tenths, {end[0]:.1f} MB at the end ({end[0] / warm[0] - 1:+.2%}); "
        f"threads {warm[1]} and {end[1]}, descriptors {warm[2]} and {end[2]}"
    )
    print(f"  generators took at most {total.cpu:.2f} cores")


def metrics(arguments: argparse.Namespace) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with servers.stand_in(*flags(arguments, "--metrics-port", str(port))) as server:
        loads = [
            Load(address=server.address, seconds=arguments.seconds, connections=12, mixed=True, seed=n)
            for n in range(arguments.generators)
        ]
        total = Tally()
        with generators(loads) as go:
            for tally in go():
                total.add(tally)
        time.sleep(1)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    counted: Counter[tuple[str, str]] = Counter()
    for labels, value in re.findall(r"^layertap_request_handled_total\{(.*?)\} (\S+)$", text, re.M):
        pairs = dict(re.findall(r'(\w+)="(.*?)"', labels))
        counted[pairs["method"], pairs["code"]] += int(float(value))
    counted = +counted
    # Who leaves may not know how the call has ended, nor whether the server had heard of it: those are told apart.
    unsure = {"CANCELLED", "DEADLINE_EXCEEDED"}
    wrong = {
        key: (counted[key], total.codes[key])
        for key in counted | total.codes
        if key[1] not in unsure and key[1] != "OK" and counted[key] != total.codes[key]
    }
    for method in {method for method, _ in total.codes}:
        seen, known = (sum(n for (one, _), n in codes.items() if one == method) for codes in (counted, total.codes))
        print(f"metrics: {method}: {seen} calls counted by the server, {known} by the generators")
        for code in ("OK", *sorted(unsure)):
            print(f"  {code}: {counted[method, code]} and {total.codes[method, code]}")
    print(f"  all other codes: {'equal' if not wrong else f'server and generators differ: {wrong}'}")


def hostile_callers(arguments: argparse.Namespace) -> None:
    hostile.table(hostile.KINDS, seconds=min(arguments.seconds, 15.0))


SCENARIOS = {
    "overload": overload,
    "flood": flood,
    "mixed": mixed,
    "metrics": metrics,
    "hostile": hostile_callers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"a comma list of {', '.join(SCENARIOS)}")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each measurement but mixed")
    parser.add_argument("--mixed-seconds", type=float, default=600.0)
    parser.add_argument("--batch-s", type=float, default=0.4, help="how long a batch of 8 requests takes")
    parser.add_argument("--generators", type=int, default=1, help="processes that make the load")
    arguments = parser.parse_args()
    chosen = list(filter(None, arguments.only.split(","))) or list(SCENARIOS)
    if len(chosen) == 1:
        SCENARIOS[chosen[0]](arguments)
        return
    codes = [subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", name]).returncode for name in chosen]
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
