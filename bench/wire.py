"""How fast layers travel: layertap beside Arrow Flight, `repeated float` and a raw socket, in one run.

Every side sends the same numbers, all 13 layers of a model 768 wide in float32, in frames of 3 MiB, from one process to
another that ends with numpy arrays. layertap's side is its own service, queue and SDK around an encoder that costs
nothing. In every round each side runs once, in turn; the tables give medians over the rounds, and medians of the
per-round ratios, so that a machine whose speed drifts does not decide. `repeated float` sends a part of the bytes, and
its time is taken per byte. The second table is the other end of the scale: short texts, one vector a call, beside a
bare grpc.aio server that answers the same messages with a ready one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path

import servers
import tensors
from compute import PEER_PYTHON
from worker import Worker

SIDES = Path(__file__).resolve().parent / "wire_sides.py"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One line of a table.

    Attributes:
        name: What it is called there.
        server: The key of its server.
        client: What wire_sides.py calls its client.
        flags: More flags for the client.
        part: Of how many bytes one is sent.
        requests: How many requests make a run, less than for others if it is slow.
    """

    name: str
    server: str
    client: str
    flags: tuple[str, ...] = ()
    part: int = 1
    requests: int | None = None


KEEP = "--keep-pages"
SHARED = "--shared-memory"
LARGE = (
    Side(name="layertap TCP, embed", server="tcp", client="embed", flags=(KEEP,)),
    Side(name="layertap TCP, embed_layers", server="tcp", client="embed-layers", flags=(KEEP,)),
    Side(name="layertap TCP, embed, without keep_pages", server="fresh", client="embed"),
    Side(name="layertap TCP, embed_layers, without keep_pages", server="fresh", client="embed-layers"),
    Side(name="layertap unix socket, embed", server="unix", client="embed", flags=(KEEP,)),
    Side(name="layertap unix socket, embed_layers", server="unix", client="embed-layers", flags=(KEEP,)),
    Side(name="layertap shared memory, embed", server="tcp", client="embed", flags=(KEEP, SHARED)),
    Side(name="layertap shared memory, embed_layers", server="tcp", client="embed-layers", flags=(KEEP, SHARED)),
    Side(name="Arrow Flight, frames viewed", server="flight", client="flight"),
    Side(name="Arrow Flight, one array a layer", server="flight", client="flight-assembled"),
    Side(name="repeated float, from arrays", server="repeated", client="repeated", part=16, requests=1),
    Side(name="repeated float, from lists", server="repeated-list", client="repeated", part=16, requests=1),
    Side(name="raw socket", server="raw", client="raw"),
)
AGAINST = ("Arrow Flight, frames viewed", "repeated float, from arrays", "raw socket")
SMALL = (
    Side(name="layertap, AsyncClient.embed", server="tcp", client="small-layertap"),
    Side(name="bare grpc.aio echo", server="echo", client="small-echo"),
)


def start(key: str, rows: int, segment_bytes: int, scratch: Path) -> servers.Server | servers.Peer:
    if key == "tcp":
        return servers.stand_in("--shared-memory-bytes", str(segment_bytes))
    if key == "fresh":
        return servers.stand_in("--fresh-pages")
    if key == "unix":
        return servers.stand_in("--host", f"unix:{scratch}/layertap.sock")
    python = PEER_PYTHON if key == "flight" else sys.executable
    return servers.Peer(python, SIDES, "serve", key, "--rows", str(rows))


def connect(side: Side, address: str, rows: int, requests: int, read: bool) -> Worker:
    python = PEER_PYTHON if side.server == "flight" else sys.executable
    size = ["--rows", str(rows), "--requests", str(side.requests or requests)]
    flags = [*size, *side.flags, *(["--read"] if read else [])]
    return Worker(side.name, [str(python), str(SIDES), "client", side.client, address, *flags])


def measure(sides: list[Side], arguments: argparse.Namespace, requests: int) -> dict[str, list[float]]:
    """Returns the seconds of each side in each round."""
    ids = [[101, *([2293] * (arguments.tokens - 2)), 102]] * arguments.texts
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    running: dict[str, servers.Server | servers.Peer] = {}
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory() as scratch:
        order = Path(scratch) / "texts.json"
        order.write_text(json.dumps({"texts": ids, "max_length": 0}))
        try:
            for side in sides:
                rows = arguments.texts * arguments.tokens // side.part
                if side.server not in running:
                    running[side.server] = start(side.server, rows, arguments.segment_bytes, Path(scratch))
                workers.append(connect(side, running[side.server].address, rows, requests, arguments.read))
                workers[-1].run(order)  # Warms both ends, and checks what arrives.
            for turn in range(arguments.rounds):
                for one in workers[turn % len(workers) :] + workers[: turn % len(workers)]:
                    times[one.name].append(one.run(order))
            for one in workers:
                if one.settings:
                    print(f"{one.name}: {one.settings}")
        finally:
            for one in workers:
                one.close()
            for server in running.values():
                server.stop()
    return times


def ratio(speeds: list[float], others: list[float]) -> float:
    return statistics.median(ours / theirs for ours, theirs in zip(speeds, others, strict=True))


def table(title: str, unit: str, speeds: dict[str, list[float]], against: list[str]) -> None:
    heads = ["side", f"{unit}, median", "least", "most", *(f"÷ {name}" for name in against)]
    print(f"\n{title}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name, found in speeds.items():
        figures = [statistics.median(found), min(found), max(found), *(ratio(found, speeds[one]) for one in against)]
        shown = [f"{figure:.0f}" if figure >= 100 else f"{figure:.3g}" for figure in figures]
        print(f"| {name} | {' | '.join(shown)} |")
    print(flush=True)


def large(arguments: argparse.Namespace, sides: list[Side]) -> None:
    times = measure(sides, arguments, arguments.requests)
    request_bytes = arguments.texts * arguments.tokens * tensors.LAYER_COUNT * tensors.ROW_BYTES
    speeds = {
        side.name: [
            (side.requests or arguments.requests) * request_bytes / side.part / seconds / 1e9
            for seconds in times[side.name]
        ]
        for side in sides
    }
    title = (
        f"all layers of {arguments.texts} texts of {arguments.tokens} tokens, {request_bytes / 1e6:.0f} MB a request, "
        f"{arguments.requests} requests a run, {arguments.rounds} rounds"
        f"{', each number read' if arguments.read else ''}"
    )
    table(title, "GB/s", speeds, [name for name in AGAINST if name in speeds])


def small(arguments: argparse.Namespace, sides: list[Side]) -> None:
    times = measure(sides, arguments, arguments.calls)
    speeds = {name: [arguments.calls / seconds for seconds in taken] for name, taken in times.items()}
    title = f"one short text a call, pooled, 16 callers, {arguments.calls} calls a run, {arguments.rounds} rounds"
    table(title, "calls/s", speeds, [side.name for side in sides if side.server == "echo"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=8, help="in one request")
    parser.add_argument("--tokens", type=int, default=512, help="in one text")
    parser.add_argument("--requests", type=int, default=4, help="in one run")
    parser.add_argument("--calls", type=int, default=3200, help="of short texts in one run; a multiple of 16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--segment-bytes", type=int, default=512 << 20, help="shared with each client")
    parser.add_argument("--read", action="store_true", help="every client adds its numbers up, in the time that counts")
    parser.add_argument("--only", default="", help="a comma list of words; sides that have one of them in their name")
    arguments = parser.parse_args()
    words = list(filter(None, arguments.only.split(",")))

    def chosen(sides: tuple[Side, ...]) -> list[Side]:
        return [side for side in sides if not words or any(word in side.name for word in words)]

    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    if sides := chosen(LARGE):
        large(arguments, sides)
    if sides := chosen(SMALL):
        small(arguments, sides)


if __name__ == "__main__":
    main()
