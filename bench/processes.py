"""One process against several on one port: many callers, streams, CPU time a text, and the memory of the weights.

Both servers run at once and take turns, so that what else the machine does meets both; ratios are those of medians. The
clients are processes of their own, as many as are asked for, and each is one user of the SDK.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import servers

from layertap.errors import counted

HERE = Path(__file__).resolve().parent


def client(address: str, work: str) -> None:
    """Does what each line of stdin orders, and answers on stdout; runs in a process of its own."""
    import asyncio

    from texts import workload

    import layertap

    async def unary(count: int) -> None:
        async with layertap.AsyncClient(address) as caller:

            async def call(share: int) -> None:
                for _ in range(share):
                    await caller.embed("I love Paris in the spring", pooling="mean")

            await asyncio.gather(*(call(count // 64) for _ in range(64)))

    def stream(texts: list[str]) -> None:
        with layertap.Client(address) as caller:
            for result in caller.embed_stream(texts, pooling="mean", truncation="right", max_length=128):
                assert result.embedding.pools[0].size

    short, _ = workload("short", 4096)
    long, _ = workload("uniform", 1024)
    print("{}", flush=True)
    for line in sys.stdin:
        count, started, cpu = int(line), time.perf_counter(), time.process_time()
        if work == "unary":
            asyncio.run(unary(count))
        else:
            chosen = short if work == "short" else long
            stream([chosen[n % len(chosen)] for n in range(count)])
        print(json.dumps({"s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}), flush=True)


class Side:
    """A server with some clients."""

    def __init__(self, process_count: int, client_count: int, work: str, *, stand_in: bool, flags: list[str]) -> None:
        start = servers.stand_in if stand_in else servers.real
        self._server = start("--processes", str(process_count), "--device", "cpu", *flags)
        command = [sys.executable, __file__, "--client", self._server.address, "--work", work]
        self._clients = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(client_count)
        ]
        for one in self._clients:
            assert one.stdout is not None and one.stdout.readline()
        self.rates: list[float] = []
        self.cpu_us: list[float] = []

    def run(self, count: int) -> None:
        """Lets each client do so much at once."""
        before, started = self._cpu_s(), time.perf_counter()
        for one in self._clients:
            assert one.stdin is not None
            one.stdin.write(f"{count}\n")
            one.stdin.flush()
        for one in self._clients:
            assert one.stdout is not None
            if not one.stdout.readline():
                raise SystemExit("a client has ended")
        total = count * len(self._clients)
        self.rates.append(total / (time.perf_counter() - started))
        self.cpu_us.append((self._cpu_s() - before) / total * 1e6)

    def stop(self) -> None:
        for one in self._clients:
            assert one.stdin is not None
            one.stdin.close()
            one.wait(timeout=60)
        self._server.stop()

    def _cpu_s(self) -> float:
        process = psutil.Process(self._server.process.pid)
        times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
        return sum(one.user + one.system for one in times)


def compare(
    work: str, count: int, rounds: int, several: int, clients: tuple[int, int], stand_in: bool, flags: list[str]
) -> None:
    """Prints the ratio of several processes to one, for one kind of work."""
    one = Side(1, clients[0], work, stand_in=stand_in, flags=flags)
    many = Side(several, clients[1], work, stand_in=stand_in, flags=flags)
    try:
        for number in range(-1, rounds):
            for side in (one, many) if number % 2 else (many, one):
                side.run(count if number >= 0 else max(64, count // 4))
                if number < 0:
                    side.rates.clear(), side.cpu_us.clear()
    finally:
        one.stop()
        many.stop()
    rates = [statistics.median(side.rates) for side in (one, many)]
    cpu = [statistics.median(side.cpu_us) for side in (one, many)]
    engine = "engine of no cost" if stand_in else "embedded model"
    print(
        f"| {work}, {engine}, clients {clients[0]} and {clients[1]} | {rates[0]:.0f}/s | {rates[1]:.0f}/s | "
        f"{rates[1] / rates[0]:.2f} | {cpu[0]:.0f} µs | {cpu[1]:.0f} µs | {cpu[1] / cpu[0]:.2f} |",
        flush=True,
    )


def memory(counts: list[int], flags: list[str]) -> None:
    """Prints the memory of servers at rest: the sum of the proportional shares of all their processes."""
    for count in counts:
        with servers.real("--processes", str(count), "--device", "cpu", *flags) as server:
            process = psutil.Process(server.process.pid)
            sizes = [_pss_mib(one.pid) for one in (process, *process.children(recursive=True))]
            each = ", ".join(f"{one:.0f}" for one in sizes)
            print(f"memory, {counted(count, 'process', 'processes')}: {sum(sizes):.0f} MiB ({each})")


def _pss_mib(pid: int) -> float:
    found = re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--part", type=float, default=1.0, help="how much of the usual work makes a run")
    parser.add_argument("--only", default="", help="a comma list of: unary, short, long, cpu, scale, memory")
    parser.add_argument("--server-flags", default="", help="more flags for the servers")
    parser.add_argument("--client", default="", help=argparse.SUPPRESS)
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.client:
        client(given.client, given.work)
        return
    chosen, n, part = given.only.split(",") if given.only else [], given.processes, given.part
    flags = given.server_flags.split()
    print(f"{os.cpu_count()} cores; one process against {n}\n")
    print("| work | one | several | ratio | server CPU, one | several | ratio |\n|---|---|---|---|---|---|---|")
    works = {
        "unary": ("unary", int(3200 * part), (1, 1), False),
        "short": ("short", int(20_000 * part), (1, 1), False),
        "long": ("long", int(1_000 * part), (1, 1), False),
        "cpu": ("short", int(40_000 * part), (1, n), True),
        "scale": ("short", int(40_000 * part), (n, n), True),
    }
    for name, (work, count, clients, stand_in) in works.items():
        if not chosen or name in chosen:
            compare(work, count, given.rounds, n, clients, stand_in, flags)
    if not chosen or "memory" in chosen:
        memory([1, 2, 4], flags)


if __name__ == "__main__":
    main()
