"""What Envoy, as deploy/envoy.yaml configures it, costs between a client and a server whose encoder costs nothing.

Each round has the same work straight and through Envoy, in turn; the figures are medians over the rounds. What a
processor spends is told apart by process, so that other work on the machine lengthens it little.

- lone: short texts, one call after the other, pooled.
- many: short texts of 16 callers, pooled.
- layers: all layers of texts of 256 tokens, 10 MB each.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import servers

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from cluster.envoy import Envoy

from layertap import AsyncClient, Client

CALLERS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one work took, in seconds: on the clock, and of a processor in the server and in Envoy."""

    clock: float
    server: float
    envoy: float


def lone(address: str, count: int) -> None:
    with Client(address) as client:
        for _ in range(count):
            client.embed("I love Paris", pooling="mean")


def many(address: str, count: int) -> None:
    async def run() -> None:
        async def caller(client: AsyncClient) -> None:
            for _ in range(count // CALLERS):
                await client.embed("I love Paris", pooling="mean")

        async with AsyncClient(address) as client:
            await asyncio.gather(*(caller(client) for _ in range(CALLERS)))

    asyncio.run(run())


def layers(address: str, count: int) -> None:
    with Client(address) as client:
        for _ in range(count):
            for _ in client.embed_layers([[101, *[1000] * 254, 102]], layers="all"):
                pass


WORKS: list[tuple[Callable[[str, int], None], int]] = [(lone, 500), (many, 1600), (layers, 40)]


def measure(work: Callable[[str, int], None], address: str, count: int, processes: Sequence[int]) -> Run:
    before = [*map(_processor_s, processes)]
    start = time.perf_counter()
    work(address, count)
    clock = time.perf_counter() - start
    server, envoy = (_processor_s(process) - then for process, then in zip(processes, before, strict=True))
    return Run(clock=clock, server=server, envoy=envoy)


def _processor_s(process: int) -> float:
    used = psutil.Process(process).cpu_times()
    return used.user + used.system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    with servers.stand_in() as server, tempfile.TemporaryDirectory() as folder:
        envoy = Envoy(Path(folder), [server])
        processes = [server.process_id, envoy.process_id]
        for work, count in WORKS:
            pairs: list[tuple[Run, Run]] = []
            for n in range(rounds + 1):
                straight = measure(work, server.address, count, processes)
                through = measure(work, envoy.target, count, processes)
                pairs += [(straight, through)] * (n > 0)  # The first round warms up.
            ratio = statistics.median(through.clock / straight.clock for straight, through in pairs)
            more = statistics.median(through.clock - straight.clock for straight, through in pairs) / count
            own = statistics.median(through.envoy for _, through in pairs) / count
            beside = statistics.median(straight.server for straight, _ in pairs) / count
            print(
                f"{work.__name__:8} {ratio:.2f} of the time straight, {more * 1e3:+.2f} ms each; of a processor "
                f"Envoy takes {own * 1e3:.2f} ms each, the server {beside * 1e3:.2f} ms"
            )
        envoy.close()


if __name__ == "__main__":
    main()
