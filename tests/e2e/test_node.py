"""A client in another language, with nothing but its library's defaults, reads the layers that ours reads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support import Server, running

from layertap import Client

FOLDER = Path(__file__).parent / "node"
TIMEOUT_S = 120
TEXTS = ["I love Paris", "", "日本語 and 🙂 é", *["paris " * 510] * 20, "two words " * 100]
"""All layers together are above the 4 MiB that a gRPC library takes as one message by default."""

pytestmark = [
    pytest.mark.timeout(3 * TIMEOUT_S),
    *(
        pytest.mark.skipif(not shutil.which(name), reason=f"there is no {name} on PATH to run a Node client with")
        for name in ("node", "npm")
    ),
]


def run(*command: str, folder: Path, given: str | None = None, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        input=given,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        encoding="utf-8",
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of the lock file, installed aside from the working tree."""
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(FOLDER / name, folder)
    run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", folder=folder)
    return folder / "node_modules"


@pytest.fixture(scope="module")
def small_frames(tiny_folder: Path) -> Iterator[Server]:
    with running("--device", "cpu", "--model-id", str(tiny_folder), "--max-frame-bytes", "16384") as server:
        yield server


@pytest.mark.parametrize("name", ["tiny_server", "small_frames"])
def test_a_node_client_with_its_defaults_reads_every_layer(
    name: str, packages: Path, request: pytest.FixtureRequest
) -> None:
    server: Server = request.getfixturevalue(name)
    with Client(server.address) as client:
        wanted = client.embed(TEXTS, layers="all", pooling="mean")
    # No proxy of the environment may stand between two processes of one host.
    environment = {"NODE_PATH": str(packages), "no_grpc_proxy": server.address.rsplit(":", 1)[0]}
    script = str(FOLDER / "read_layers.js")
    found = json.loads(
        run("node", script, server.address, folder=FOLDER, given=json.dumps(TEXTS), environment=environment)
    )

    assert found["layers"] == list(wanted.layers)
    assert found["token_counts"] == wanted.token_counts.tolist()
    rows = [np.concatenate(wanted.ragged(layer)) for layer in wanted.layers]
    assert sum(layer.nbytes for layer in rows) > 4 << 20
    if name == "small_frames":
        assert found["frame_count"] >= sum(layer.nbytes // 16384 for layer in rows)
    for layer, values in zip(rows, found["values"], strict=True):
        assert np.array_equal(np.array(values, np.float32).reshape(layer.shape), layer)
    assert np.array_equal(np.array(found["pooled"], np.float32).reshape(wanted.pooled.shape), wanted.pooled)
