"""Sends a server what nobody would: random bytes, mutated messages, random texts, ids, masks and options, all RPCs.

The cases are those of tests/support/fuzzing.py, in any number, against a tiny model with shared memory on; the
lengths of some are of a heavy tail. Each call must end, with a code that the contract names, and afterwards the
server must answer a good call as before and have grown little. Health is asked all the time: what it waits is what
holds the event loop.
Whatever else happens is printed with its seed and ends the run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import servers
from load import health

from layertap import Client

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from support.fuzzing import Fuzzer

GOOD = ["I love Paris", "Hello"]
SETTINGS = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others follow")
    parser.add_argument(
        "--heavy", type=float, default=0.05, help="share of calls with long lists, half of them gzipped"
    )
    parser.add_argument("--concurrency", type=int, default=16, help="calls at once")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SETTINGS))
        own = ["--port", "0", "--device", "cpu", "--model-id", folder, "--load-format", "dummy"]
        with (
            servers.real(*own, "--shared-memory-bytes", str(1 << 20), "--max-character-count", "2000") as server,
            Client(server.address) as client,
        ):
            wanted = client.embed(GOOD, layers="all").hidden_states
            fuzzer = Fuzzer(server.address, heavy_share=arguments.heavy)
            started, most = time.perf_counter(), 0.0
            step = max(arguments.cases // 10, 1)
            grown: list[float] = []
            before = server.memory_mb
            with health(server.address) as waits_s:
                for first in range(arguments.seed, arguments.seed + arguments.cases, step):
                    count = min(step, arguments.seed + arguments.cases - first)
                    asyncio.run(fuzzer.run(count, seed=first, concurrency=arguments.concurrency))
                    grown.append(server.memory_mb - before)
                    most = max(most, server.peak_memory_mb - before)
            seconds = time.perf_counter() - started
            found = client.embed(GOOD, layers="all").hidden_states
            if not all(np.abs(one - other).max() < 1e-5 for one, other in zip(found, wanted, strict=True)):
                raise SystemExit("wrong: a good call is answered otherwise than before")
    table: dict[str, Counter[str]] = {}
    for (rpc, code), count in sorted(fuzzer.codes.items()):
        table.setdefault(rpc, Counter())[code] += count
    total = fuzzer.codes.total()
    print(f"fuzz: {total} calls in {seconds:.0f} s, seeds {arguments.seed} to {arguments.seed + total - 1}")
    print(f"  server: {', '.join(f'{one:+.0f}' for one in grown)} MB after each tenth, at most {most:+.0f} MB")
    median, p99, longest = np.percentile(waits_s, [50, 99, 100]) * 1e3
    print(f"  health (it waits for the event loop): median {median:.1f} ms, p99 {p99:.1f} ms, at most {longest:.0f} ms")
    for rpc, codes in table.items():
        print(f"  {rpc}: {', '.join(f'{count} {code}' for code, count in codes.most_common())}")


if __name__ == "__main__":
    main()
