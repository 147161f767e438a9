"""Fixtures of the tests of Ray, Spark and Dask, which run in an environment of their own, `.ray`: `make test-ray`.

Everything listens on loopback, and nothing is reported to anyone.
"""

from __future__ import annotations

import os
import sys

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_AUTH_MODE": "disabled",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Or it turns loopback into the address of the machine.
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYSPARK_PYTHON": sys.executable,
    "SPARK_LOCAL_IP": "127.0.0.1",
}

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from layertap import Client
from layertap_server.testing import running_server

LONG = "word " * 600


@pytest.fixture(scope="session")
def client() -> Iterator[Client]:
    """A client of a server with the embedded model, whose answers are what all others must get."""
    with running_server("--device", "cpu") as server, Client(server.address) as client:
        yield client


def texts_of(count: int) -> list[str | None]:
    """Short texts, none like another, of which two are bad."""
    words = ["paris", "love", "hello", "river", "a", "cold", "morning", "don't"]
    texts: list[str | None] = [
        " ".join(words[(n * 7 + k) % 8] for k in range(1 + n % 5)) + f" {n}" for n in range(count)
    ]
    texts[count // 3], texts[count // 2] = None, LONG
    return texts


def write_corpus(folder: Path, texts: list[str | None], *, file_count: int) -> None:
    """Writes texts into several Parquet files, with their positions as ids."""
    folder.mkdir()
    size = -(-len(texts) // file_count)
    for n in range(file_count):
        ids = range(n * size, min((n + 1) * size, len(texts)))
        pq.write_table(pa.table({"id": ids, "text": [texts[k] for k in ids]}), folder / f"{n:03}.parquet")


def pooled(client: Client, texts: list[str | None]) -> list[Any]:
    """What the server makes of texts: the bytes of each vector, and None for bad ones."""
    results = client.embed_stream(texts, pooling="mean")  # type: ignore[arg-type]
    return [None if one.error else one.embedding.pooled.tobytes() for one in results]


def found(tables: list[pa.Table]) -> dict[int, Any]:
    """The bytes of the vectors in tables by id, and None where there is an error instead."""
    rows: dict[int, Any] = {}
    for table in tables:
        vectors, errors = table.column("pool_0"), table.column("error").to_pylist()
        for number, vector, error in zip(table.column("id").to_pylist(), vectors, errors, strict=True):
            assert number not in rows and vector.is_valid == (error is None)
            rows[number] = vector.values.to_numpy().tobytes() if vector.is_valid else None
    return rows
