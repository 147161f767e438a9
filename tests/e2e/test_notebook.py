"""The notebook in `examples/`: its script runs and shows what its words say; the notebook is that script, executed."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import ROOT, Server

EXAMPLES = ROOT / "examples"
SCRIPT = EXAMPLES / "layers.py"
NOTEBOOK = EXAMPLES / "layers.ipynb"
MAX_BYTES = 1_000_000
FIGURE_COUNT = 6


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text())["cells"]


def test_the_script_runs(real_server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAYERTAP_TARGET", real_server.address)
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))
    import matplotlib

    matplotlib.use("agg")
    found = runpy.run_path(str(SCRIPT))
    assert found["embedding"].last_hidden_state.shape == (1, 7, 384)
    assert np.abs(found["masked"] - found["alone"]).max() < 1e-5 < np.abs(found["seen"] - found["alone"]).max()
    lines = [line.get_ydata() for line in found["words"].axes[0].lines]
    same, apart = np.array(lines[:2]), np.array(lines[2:])
    assert same.shape == apart.shape == (2, 7)
    assert abs(same[:, 0].mean() - apart[:, 0].mean()) < 0.02  # In layer 0 it is the same word at some position.
    assert (same[:, 1:].min(0) > apart[:, 1:].max(0)).all()
    assert found["panels"].axes[0].images[0].get_clim() == (-1, 1)  # No cosine is shown as another.
    attention = found["looks"].axes[0].images[0]
    assert attention.get_clim() == (0, 1) and np.abs(attention.get_array().sum(-1) - 1).max() < 1e-5
    assert found["long"].window_counts[0] > 1 and "guitar" in found["sentences"][int(found["cosines"].argmax())]
    from matplotlib import pyplot

    assert len(pyplot.get_fignums()) == FIGURE_COUNT
    pyplot.close("all")


def test_the_notebook_is_the_script(cells: list[dict[str, Any]]) -> None:
    kinds, sources = [], []
    for part in re.split(r"^# %%", SCRIPT.read_text(), flags=re.MULTILINE)[1:]:
        first, _, rest = part.partition("\n")
        markdown = first.strip() == "[markdown]"
        kinds.append("markdown" if markdown else "code")
        sources.append((re.sub(r"^# ?", "", rest, flags=re.MULTILINE) if markdown else rest).strip())
    assert [cell["cell_type"] for cell in cells] == kinds
    assert ["".join(cell["source"]).strip() for cell in cells] == sources, "run `make notebook`"


def test_the_notebook_was_run_whole_and_is_small(cells: list[dict[str, Any]]) -> None:
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == FIGURE_COUNT
    assert NOTEBOOK.stat().st_size < MAX_BYTES
    assert not re.search(r"/tmp/|/home/|/root/|/work/|/Users/|site-packages", NOTEBOOK.read_text())
