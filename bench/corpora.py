"""Ray Data with one actor beside the bare engine: texts a second, in turns.

The bare engine is the tokenizer, the queue and the encoder in a process of its own. Ray reads a Parquet file and hands
the vectors over as Arrow batches; its clock runs from when its actor has loaded the model until the last batch
has come. Vectors must be equal to the last bit before any timing counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from texts import workload
from worker import Worker

import layertap_server.ray
from layertap_server.model.checkpoint import EMBEDDED_MODEL

HERE = Path(__file__).resolve().parent


READY = Path(tempfile.gettempdir()) / f"layertap-ready-{os.getpid()}"


class Timed(layertap_server.ray.Embedder):
    """An embedder that notes when it is ready."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        READY.write_text(str(time.time()))


def by_ray(corpus: Path, cores: int, max_length: int) -> tuple[float, np.ndarray]:
    """Returns the seconds of one run and the vectors in the order of the texts."""
    layertap_server.ray.Embedder = Timed
    dataset = ray.data.read_parquet(str(corpus))
    outputs = layertap_server.ray.embed_dataset(
        dataset, pooling="mean", truncation="right", max_length=max_length, keep=["id"], num_cpus=cores
    )
    tables = list(outputs.iter_batches(batch_size=None, batch_format="pyarrow"))
    seconds = time.time() - float(READY.read_text())
    table = pa.concat_tables(tables).combine_chunks().sort_by("id")
    assert table.column("error").null_count == table.num_rows
    vectors = table.column("pool_0").combine_chunks()
    return seconds, vectors.flatten().to_numpy().reshape(table.num_rows, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=6000)
    parser.add_argument("--workload", choices=["mixed", "uniform", "short"], default="short")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--aim", type=float, default=0.85)
    arguments = parser.parse_args()
    texts, max_length = workload(arguments.workload, arguments.texts)
    ray.init(num_cpus=arguments.cores + 1, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        order, saved = folder / "texts.json", folder / "engine.npy"
        order.write_text(json.dumps({"texts": texts, "max_length": max_length}))
        pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), folder / "corpus.parquet")
        flags = ["--device", "cpu", "--instances", str(arguments.cores), "--instance-threads", "1"]
        engine = Worker("engine", [sys.executable, str(HERE / "sides.py"), "engine", str(EMBEDDED_MODEL), *flags])
        ratios = []
        for _ in range(arguments.rounds):
            bare = engine.run(order, saved)
            seconds, vectors = by_ray(folder / "corpus.parquet", arguments.cores, max_length)
            if not np.array_equal(vectors, np.load(saved)):
                raise SystemExit("wrong: the vectors differ")
            ratios.append(bare / seconds)
            print(
                f"engine {len(texts) / bare:7.0f} texts/s   Ray {len(texts) / seconds:7.0f} texts/s   {ratios[-1]:.3f}"
            )
        engine.close()
    ray.shutdown()
    READY.unlink(missing_ok=True)
    ratio = statistics.median(ratios)
    print(f"Ray ÷ engine, median of {arguments.rounds} rounds: {ratio:.3f} (aim: {arguments.aim})")
    sys.exit(ratio < arguments.aim)


if __name__ == "__main__":
    main()
