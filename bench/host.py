"""What the way of a text through client and server costs on the host, around an encoder that costs nothing.

CPU seconds of the server and of its client are counted apart, and no figure but the ratios to peers depends on how fast
the machine happens to be: other work beside it does little harm. Several checkouts are compared in alternating runs,
each with its own client against its own server; the table gives the medians of each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import servers
from host_client import LAYER_ROWS, REQUEST_BYTES

HERE = Path(__file__).resolve().parent
REQUEST_GB = REQUEST_BYTES / 1e9


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one run took, for one text, call or gigabyte.

    Attributes:
        server_s: CPU seconds of the server, all its processes together.
        client_s: CPU seconds of the client.
        wall_s: Seconds.
    """

    server_s: float
    client_s: float
    wall_s: float


Costs = dict[str, list[Cost]]
"""What each kind of work took, round by round."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One kind of work.

    Attributes:
        name: What host_client.py calls it.
        count: How often it is done in a run.
        share: How much of what is counted one of it is.
        peer: Which peer of layertap does it. Empty: layertap.
    """

    name: str
    count: int
    share: float = 1.0
    peer: str = ""

    @property
    def key(self) -> str:
        return f"{self.peer} {self.name}".strip()


WORKS = (
    Work(name="short", count=20_000),
    Work(name="long", count=4_000),
    Work(name="cut", count=2_000),
    Work(name="ids", count=8_000),
    Work(name="lone", count=600),
    Work(name="unary", count=1_600),
    Work(name="unary", count=1_600, peer="echo"),
    Work(name="embed", count=4, share=REQUEST_GB),
    Work(name="embed_layers", count=4, share=REQUEST_GB),
    Work(name="layers", count=4, share=REQUEST_GB, peer="flight"),
    Work(name="layers", count=4, share=REQUEST_GB, peer="grpc"),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        figure: What it says.
        unit: Its unit.
        needs: The kinds of work that it is made from.
        of: Returns it, from what these took in one round.
        required: What it should be at least, or at most.
        aim: What it may become.
    """

    figure: str
    unit: str
    needs: tuple[str, ...]
    of: Callable[..., float]
    required: str
    aim: str


def server_us(cost: Cost) -> float:
    return cost.server_s * 1e6


def client_us(cost: Cost) -> float:
    return cost.client_s * 1e6


def speed_ratio(cost: Cost, other: Cost) -> float:
    return other.wall_s / cost.wall_s


ROWS = (
    Row(figure="server, a short text streamed", unit="µs", needs=("short",), of=server_us, required="≤ 42", aim="36"),
    Row(figure="server, 128 tokens streamed", unit="µs", needs=("long",), of=server_us, required="≤ 230", aim="205"),
    Row(figure="server, 257 tokens cut to 128 streamed", unit="µs", needs=("cut",), of=server_us, required="", aim=""),
    Row(figure="server, 128 ids streamed", unit="µs", needs=("ids",), of=server_us, required="≤ 35", aim="20"),
    Row(figure="client, a short text streamed", unit="µs", needs=("short",), of=client_us, required="≤ 35", aim="20"),
    Row(figure="client, 128 tokens streamed", unit="µs", needs=("long",), of=client_us, required="≤ 60", aim="30"),
    Row(figure="client, 128 ids streamed", unit="µs", needs=("ids",), of=client_us, required="", aim=""),
    Row(
        figure="unary, 16 callers, calls/s ÷ bare grpc.aio echo",
        unit="",
        needs=("unary", "echo unary"),
        of=speed_ratio,
        required="≥ 0.6",
        aim="0.75",
    ),
    Row(
        figure="unary, 16 callers, server CPU ÷ bare grpc.aio echo",
        unit="",
        needs=("unary", "echo unary"),
        of=lambda cost, echo: cost.server_s / echo.server_s,
        required="",
        aim="",
    ),
    Row(
        figure="server, a call of 16 callers' unary calls",
        unit="µs",
        needs=("unary",),
        of=server_us,
        required="",
        aim="",
    ),
    Row(figure="server, a lone unary call", unit="µs", needs=("lone",), of=server_us, required="≤ 700", aim="500"),
    Row(
        figure="client, a call of 16 callers' unary calls",
        unit="µs",
        needs=("unary",),
        of=client_us,
        required="",
        aim="",
    ),
    Row(
        figure="bare grpc.aio echo: client, the same",
        unit="µs",
        needs=("echo unary",),
        of=client_us,
        required="",
        aim="",
    ),
    Row(figure="client, a lone unary call", unit="µs", needs=("lone",), of=client_us, required="", aim=""),
    Row(
        figure="server, all layers over TCP, embed",
        unit="s/GB",
        needs=("embed",),
        of=lambda cost: cost.server_s,
        required="≤ 0.55",
        aim="0.4",
    ),
    Row(
        figure="server, all layers over TCP, embed_layers",
        unit="s/GB",
        needs=("embed_layers",),
        of=lambda cost: cost.server_s,
        required="≤ 0.55",
        aim="0.4",
    ),
    Row(
        figure="client, all layers over TCP, embed",
        unit="s/GB",
        needs=("embed",),
        of=lambda cost: cost.client_s,
        required="≤ 0.6",
        aim="0.5",
    ),
    Row(
        figure="client, all layers over TCP, embed_layers",
        unit="s/GB",
        needs=("embed_layers",),
        of=lambda cost: cost.client_s,
        required="≤ 0.6",
        aim="0.5",
    ),
    Row(
        figure="Arrow Flight: server",
        unit="s/GB",
        needs=("flight layers",),
        of=lambda c: c.server_s,
        required="",
        aim="",
    ),
    Row(
        figure="Arrow Flight: client",
        unit="s/GB",
        needs=("flight layers",),
        of=lambda c: c.client_s,
        required="",
        aim="",
    ),
    Row(
        figure="bare grpc.aio, ready messages: server",
        unit="s/GB",
        needs=("grpc layers",),
        of=lambda c: c.server_s,
        required="",
        aim="",
    ),
    Row(
        figure="bare grpc.aio, ready messages: client",
        unit="s/GB",
        needs=("grpc layers",),
        of=lambda c: c.client_s,
        required="",
        aim="",
    ),
    Row(
        figure="embed ÷ Arrow Flight, one array a layer, GB/s",
        unit="",
        needs=("embed", "flight layers"),
        of=speed_ratio,
        required="≥ 0.9",
        aim="1.1",
    ),
    Row(
        figure="embed_layers ÷ embed, GB/s",
        unit="",
        needs=("embed_layers", "embed"),
        of=speed_ratio,
        required="≥ 1.0",
        aim="1.2",
    ),
)


class Side:
    """One checkout: its server, its client, and what work took there."""

    def __init__(self, name: str, folder: Path, flags: Sequence[str], peers: Sequence[str]) -> None:
        self.name = name
        python = folder / ".venv/bin/python"
        self.costs: Costs = {}
        self._servers: dict[str, servers.Peer] = {}
        self._clients: dict[str, subprocess.Popen[str]] = {}
        serve = [folder / "bench/stand_in.py", "--log-level", "error", *flags]
        commands: dict[str, list[str | Path]] = {"": serve}
        for peer in peers:
            commands[peer] = [HERE / "wire_sides.py", "serve", peer, "--rows", str(LAYER_ROWS)]
        for peer, command in commands.items():
            self._servers[peer] = server = servers.Peer(python, *command)
            client = [python, HERE / "host_client.py", server.address, *(["--peer", peer] if peer else [])]
            self._clients[peer] = subprocess.Popen(
                list(map(str, client)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            self._answer(peer)

    def run(self, work: Work, count: int) -> Cost:
        """Does some work and returns what it took."""
        stdin = self._clients[work.peer].stdin
        assert stdin is not None
        before = self._server_cpu_s(work.peer)
        stdin.write(json.dumps({"work": work.name, "count": count}) + "\n")
        stdin.flush()
        answer = self._answer(work.peer)
        amount = count * work.share
        return Cost(
            server_s=(self._server_cpu_s(work.peer) - before) / amount,
            client_s=answer["cpu_s"] / amount,
            wall_s=answer["seconds"] / amount,
        )

    def stop(self) -> None:
        for client in self._clients.values():
            assert client.stdin is not None
            client.stdin.close()
            client.wait(timeout=60)
        for server in self._servers.values():
            server.stop()

    def _server_cpu_s(self, peer: str) -> float:
        process = psutil.Process(self._servers[peer].process_id)
        times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
        return sum(one.user + one.system for one in times)

    def _answer(self, peer: str) -> dict[str, float]:
        stdout = self._clients[peer].stdout
        assert stdout is not None
        for line in stdout:
            if line.startswith("{"):
                answer: dict[str, float] = json.loads(line)
                return answer
        raise SystemExit(f"the client of {self.name} {peer} ended without an answer")


def table(sides: Sequence[Side]) -> None:
    heads = ["figure", *(side.name for side in sides), *(["last ÷ first"] if len(sides) > 1 else []), "required", "aim"]
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row in ROWS:
        if not all(need in sides[0].costs for need in row.needs):
            continue
        found = [
            statistics.median(row.of(*costs) for costs in zip(*(side.costs[need] for need in row.needs), strict=True))
            for side in sides
        ]
        shown = [f"{one:.3g} {row.unit}".strip() for one in found]
        ratio = [f"{found[-1] / found[0]:.2f}"] if len(sides) > 1 else []
        print(f"| {' | '.join([row.figure, *shown, *ratio, row.required, row.aim])} |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--part", type=float, default=1.0, help="how much of the usual work makes a run")
    parser.add_argument("--only", default="", help="a comma list of kinds of work: " + ", ".join(w.key for w in WORKS))
    parser.add_argument("--against", action="append", default=[], metavar="NAME=FOLDER", help="another checkout")
    parser.add_argument("--server-flags", default="", help="more flags for layertap's server")
    arguments = parser.parse_args()
    chosen = list(filter(None, arguments.only.split(",")))
    works = [work for work in WORKS if not chosen or work.key in chosen]
    folders = {**dict(one.split("=", 1) for one in arguments.against), "here": str(HERE.parent)}
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    sides: list[Side] = []
    try:
        for name, folder in folders.items():
            peers = sorted({work.peer for work in works if work.peer})
            sides.append(Side(name, Path(folder), arguments.server_flags.split(), peers))
        for round_number in range(-1, arguments.rounds):  # The first one warms both ends.
            for work in works:
                count = max(1, round(work.count * (arguments.part if round_number >= 0 else arguments.part / 4)))
                turned = sides if round_number % 2 else sides[::-1]
                for side in turned:
                    cost = side.run(work, max(16, count // 16 * 16) if work.name == "unary" else count)
                    if round_number >= 0:
                        side.costs.setdefault(work.key, []).append(cost)
            print(f"round {round_number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    finally:
        for side in sides:
            side.stop()
    table(sides)


if __name__ == "__main__":
    main()
