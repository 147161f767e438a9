"""The recipes of docs/operate/corpora.md for Spark and Dask, run as they stand there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from corpora.conftest import pooled, texts_of, write_corpus

from layertap import Client

pytestmark = pytest.mark.timeout(300)  # Spark starts a virtual machine, and each a model.

PAGE = (Path(__file__).parents[2] / "docs/operate/corpora.md").read_text()


def run(heading: str) -> None:
    """Runs the code of one section."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    # Names of its own, of a module that does not exist: functions travel to other processes by value.
    exec(compile(code, heading, "exec"), {"__name__": "__main__"})


@pytest.fixture
def wanted(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the server makes of the texts in the folder `corpus` here."""
    texts = texts_of(300)
    write_corpus(tmp_path / "corpus", texts, file_count=2)
    monkeypatch.chdir(tmp_path)
    return pooled(client, texts)


def check(folder: Path, wanted: list[Any]) -> None:
    table = pq.read_table(folder)
    assert table.num_rows == len(wanted)
    for number, vector, error in zip(table["id"].to_pylist(), table["pool_0"].to_pylist(), table["error"], strict=True):
        assert error.is_valid == (wanted[number] is None)
        assert (vector is None) == (wanted[number] is None)
        assert vector is None or np.array(vector, np.float32).tobytes() == wanted[number]


@pytest.mark.skipif(shutil.which("java") is None, reason="Spark needs Java")
# Of frames, which the recipe has none of.
@pytest.mark.filterwarnings("ignore:PySpark does not yet fully support pandas")
def test_spark(wanted: list[Any], tmp_path: Path) -> None:
    from pyspark.sql import SparkSession

    settings = {"spark.ui.enabled": "false", "spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
    builder = SparkSession.builder.master("local[1]")
    for name, value in settings.items():
        builder = builder.config(name, value)
    session = builder.getOrCreate()
    try:
        run("Spark")
        check(tmp_path / "vectors", wanted)
    finally:
        session.stop()


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # Dask resets the index of a frame in place.
def test_dask(wanted: list[Any], tmp_path: Path) -> None:
    run("Dask")
    check(tmp_path / "vectors", wanted)
