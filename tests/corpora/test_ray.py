"""Ray Data on a cluster of two nodes with the embedded model: what is killed costs time, and nothing else."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import ray
from corpora.conftest import found, pooled, texts_of, write_corpus
from ray.cluster_utils import Cluster

from layertap import Client
from layertap_server.ray import embed_dataset, embed_shards

STORE_BYTES = 100 << 20
NODE = {
    "num_cpus": 2,
    "node_ip_address": "127.0.0.1",
    "object_store_memory": STORE_BYTES,
    "include_dashboard": False,
}

pytestmark = [
    pytest.mark.timeout(300),  # A node, an actor and a model start in each test.
    pytest.mark.filterwarnings(r"ignore::Warning:ray\..*"),  # Ray's own, of what it uses itself.
]

DRIVER = """
import sys, ray
from layertap_server.ray import embed_shards
address, corpus, out = sys.argv[1:]
ray.init(address=address, _node_ip_address="127.0.0.1")
embed_shards(corpus, out, pooling="mean", id_field="id", actors=1)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes, to which this process is connected."""
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    cluster.add_node(**{**NODE, "include_dashboard": None})
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, _node_ip_address="127.0.0.1", log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def workers() -> list[psutil.Process]:
    """The processes that hold a model."""
    return [one for one in psutil.process_iter(["cmdline"]) if "MapWorker" in " ".join(one.info["cmdline"] or [])]


def spilled() -> list[Path]:
    """What the object stores have put on the disk because they were full."""
    return [path for path in Path("/tmp/ray/session_latest").glob("ray_spilled_objects*/**/*") if path.is_file()]


def test_outputs_of_many_times_the_input_need_no_more_memory(cluster: Cluster) -> None:
    texts = [f"text number {n} has some words" for n in range(9000)]
    dataset = ray.data.from_items([{"id": n, "text": text} for n, text in enumerate(texts)], override_num_blocks=6)
    outputs = embed_dataset(dataset, layers=[-1], keep=["id"], batch_size=1500)
    rows = byte_count = most = 0
    for batch in outputs.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        rows += batch.num_rows
        byte_count += batch.nbytes
        memory = [one.memory_full_info().uss for one in workers()]
        most = max([most, *memory])
    assert rows == len(texts)
    assert byte_count > 50 * sum(map(len, texts)) and byte_count > STORE_BYTES
    assert most < 1200 << 20, f"an actor took {most >> 20} MiB"
    assert not spilled()
    listening = [one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN and one.pid in pids()]
    assert listening and {one.laddr.ip.removeprefix("::ffff:") for one in listening} <= {"127.0.0.1", "::1"}


def pids() -> set[int]:
    """The processes of the cluster."""
    return {one.pid for one in psutil.Process().children(recursive=True)}


def test_a_job_that_is_killed_goes_on_from_its_finished_files(cluster: Cluster, client: Client, tmp_path: Path) -> None:
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    texts = texts_of(3200)
    write_corpus(corpus, texts, file_count=8)
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, cluster.address, str(corpus), str(out)])
    deadline = time.monotonic() + 100
    while len(done := list(out.glob("*.parquet"))) < 3:
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in done}
    results = embed_shards(corpus, out, pooling="mean", id_field="id", actors=1)
    assert [one.error for one in results] == [None] * 8
    assert sum(one.was_done for one in results) >= 3 and sum(one.text_count for one in results) == 3198
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    wanted = pooled(client, texts)
    table = pq.read_table(out)
    vectors = {n: v.values.to_numpy().tobytes() for n, v in zip(table["ids"].to_pylist(), table["pool_0"], strict=True)}
    assert vectors == {n: vector for n, vector in enumerate(wanted) if vector is not None}


def test_a_node_that_dies_in_the_middle_costs_no_vector(cluster: Cluster, client: Client, tmp_path: Path) -> None:
    texts = texts_of(20_000)
    write_corpus(tmp_path / "corpus", texts, file_count=20)
    dataset = ray.data.read_parquet(str(tmp_path / "corpus"), override_num_blocks=20)
    outputs = embed_dataset(dataset, pooling="mean", keep=["id"], actors=2, batch_size=500)
    (worker,) = [node for node in cluster.list_all_nodes() if node is not cluster.head_node]
    tables: list[Any] = []
    rows = 0
    for batch in outputs.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        tables.append(batch)
        rows += batch.num_rows
        if rows >= 6000 and worker is not None:
            cluster.remove_node(worker, allow_graceful=False)
            worker = None
    assert worker is None and rows == len(texts)
    got = found(tables)
    assert [got[n] for n in range(len(texts))] == pooled(client, texts)
