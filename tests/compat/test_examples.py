"""The examples that need other projects' packages run, and show what their words say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest

from layertap import Client
from layertap_server.testing import ServerProcess

ROOT = Path(__file__).parents[2]


def run(script: str | Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'client'}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_grid_search_names_the_best_layer(server: ServerProcess) -> None:
    printed = run("best_layer.py", server.address)
    scores = {match[1]: float(match[2]) for match in re.finditer(r"^(layer .*?) +([\d.]+)$", printed, re.MULTILINE)}
    assert len(scores) == 14 and max(scores.values()) > 0.8
    best = re.search(r"best: .*layer': (\d+), .*pooling': '(\w+)'", printed)
    assert scores[f"layer {best[1]:>2} {best[2]}"] == max(scores.values())


def test_the_search_finds_the_document(server: ServerProcess) -> None:
    assert "swimming pool" in run("search.py", "where can one learn to swim?", server.address).splitlines()[0]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_sets_and_loaders_get_vectors_in_their_own_processes(server: ServerProcess, method: str) -> None:
    lines = run("training_data.py", server.address, "--start-method", method).splitlines()
    assert lines[0] == "data set: (12, 384)"
    assert [line for line in lines if line.startswith("batch")] == lines[1:] and len(lines) == 4
    assert all(re.fullmatch(r"batch: \(4, \d+, 384\)", line) for line in lines[1:])


PAGE = (ROOT / "docs/guide/other-clients.md").read_text()
BLOCKS = re.findall(r"^```py\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=["tritonclient", "langchain", "sklearn", "datasets"])
def test_the_code_of_the_page_runs(server: ServerProcess, tmp_path: Path, block: str) -> None:
    script = tmp_path / "page.py"
    script.write_text(block.replace("127.0.0.1:50051", server.address))
    run(script)


def test_vectors_of_a_data_set_are_those_of_encode_and_are_kept(client: Client) -> None:
    calls: list[int] = []

    def add(batch: dict[str, list[str]]) -> dict[str, np.ndarray]:
        calls.append(len(batch["text"]))
        return {"vector": client.encode(batch["text"])}

    texts = [f"text {n}" for n in range(10)]
    rows = datasets.Dataset.from_dict({"text": texts}).map(add, batched=True, batch_size=4).with_format("numpy")
    assert np.array_equal(rows["vector"][:], client.encode(texts))
    assert calls == [4, 4, 2]
