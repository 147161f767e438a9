"""The client of bench/host.py, in a process of its own: does one kind of work an order, and says what it cost.

An order is one JSON line on stdin: the kind of work and how often. The answer is one on stdout: seconds, and the CPU
seconds of this process. Uses what every layertap has had since its first version, so that it runs in other checkouts.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import tensors
import wire_sides
from texts import workload

import layertap

LAYER_TEXTS, LAYER_TOKENS = 8, 512
LAYER_ROWS = LAYER_TEXTS * LAYER_TOKENS
REQUEST_BYTES = LAYER_ROWS * tensors.LAYER_COUNT * tensors.ROW_BYTES
"""One request for all layers of some texts."""

Work = Callable[[int], None]


def stream(client: layertap.Client, inputs: list[Any], length: int = 256) -> Work:
    """Returns what streams so many texts, and looks at the vector of each."""

    def work(count: int) -> None:
        chosen = [inputs[n % len(inputs)] for n in range(count)]
        found = 0
        for result in client.embed_stream(chosen, pooling="mean", truncation="right", max_length=length):
            found += len(result.embedding.pools[0])
        if found != count:
            raise SystemExit(f"{found} of {count} texts were answered")

    return work


def lone(client: layertap.Client) -> Work:
    """Returns what sends so many short texts, one a call, one after the other."""

    def work(count: int) -> None:
        for _ in range(count):
            client.embed(wire_sides.TEXT, pooling="mean")

    return work


def layers(get: Callable[[Any], wire_sides.Layers]) -> Work:
    """Returns what gets all layers so many times."""
    ids = [[101, *([2293] * (LAYER_TOKENS - 2)), 102]] * LAYER_TEXTS
    tensors.check(get(ids), LAYER_ROWS)

    def work(count: int) -> None:
        for _ in range(count):
            get(ids)

    return work


def works(address: str, peer: str) -> dict[str, Work]:
    if peer == "echo":
        return {"unary": lambda count: asyncio.run(wire_sides.small_echo(address, count))}
    if peer == "flight":
        return {"layers": layers(wire_sides.use_flight(address, LAYER_ROWS, assembled=True))}
    if peer == "grpc":
        layertap.keep_pages(2 * REQUEST_BYTES)
        return {"layers": layers(wire_sides.use_ready(address, LAYER_ROWS))}
    if inspect.signature(layertap.keep_pages).parameters:
        layertap.keep_pages(2 * REQUEST_BYTES)
    else:
        layertap.keep_pages()
    client = layertap.Client(address)
    short, _ = workload("short", 4096)
    above, _ = workload("uniform", 1024)
    long = [" ".join(text.split()[:62]) for text in above]  # 126 tokens on average
    ids = [[101, *(1996 + (n * 7 + k) % 20000 for k in range(126)), 102] for n in range(1024)]
    return {
        "short": stream(client, short),
        "long": stream(client, long),
        "cut": stream(client, above, length=128),
        "ids": stream(client, ids),
        "lone": lone(client),
        "unary": lambda count: asyncio.run(wire_sides.small_layertap(address, count)),
        "embed": layers(wire_sides.use_embed(client)),
        "embed_layers": layers(wire_sides.use_embed_layers(client)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument(
        "--peer", choices=["echo", "flight", "grpc"], default="", help="the server is this peer of layertap"
    )
    arguments = parser.parse_args()
    found = works(arguments.address, arguments.peer)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        started, cpu_started = time.perf_counter(), time.process_time()
        found[order["work"]](order["count"])
        answer = {"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - cpu_started}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
