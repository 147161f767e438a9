"""Fixtures of all rings: the embedded model, a tiny one, and one running server for each, shared by the whole session.

Importing this imports no torch, because the unit tests run without it.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # Before transformers is imported: no test may reach for a model hub.
# Before torch is imported: threads that wait for each other awake would take the core of the other tests or servers.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from support import PROCESSES, TINY_SETTINGS, Server, forks, open_client, running

from layertap_server.model.checkpoint import EMBEDDED_MODEL

if TYPE_CHECKING:
    from support.oracle import Oracle

# The same examples in every run, and no times: a red run is then that of the change at hand.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

# Each has a command of its own: `make test-compat`, `test-deploy`, `test-cluster`, `test-explore`, `test-ray`.
collect_ignore = ["compat", "deploy", "cluster", "explore", "corpora"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what is true of one process alone where LAYERTAP_PROCESSES gives each server several."""
    if PROCESSES > 1:
        for item in items:
            if item.get_closest_marker("one_process"):
                item.add_marker(pytest.mark.skip(reason="it is about one process"))


@pytest.fixture(scope="session", autouse=True)
def forking_process_ends() -> Iterator[None]:
    """Is set up first and so torn down last, after the servers of the session."""
    yield
    forks.close()


@pytest.fixture(scope="session")
def real_folder() -> Path:
    assert EMBEDDED_MODEL.is_dir(), "the embedded model is missing: run `make model`"
    return EMBEDDED_MODEL


@pytest.fixture(scope="session")
def real_oracle(real_folder: Path) -> Oracle:
    from support.oracle import Oracle

    return Oracle.load(real_folder)


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        import torch

        if not torch.cuda.is_available():
            pytest.skip("there is no cuda")
    return str(request.param)


@pytest.fixture(scope="session")
def real_server(device: str, real_folder: Path) -> Iterator[Server]:
    with running("--device", device) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, real_folder: Path) -> Path:
    """A small random BERT with weights of its own and the embedded vocabulary."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("tiny-bert")
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**TINY_SETTINGS)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (folder / name).write_bytes((real_folder / name).read_bytes())
    return folder


@pytest.fixture(scope="session")
def tiny_oracle(tiny_folder: Path) -> Oracle:
    from support.oracle import Oracle

    return Oracle.load(tiny_folder)


@pytest.fixture(scope="session")
def tiny_server(tiny_folder: Path) -> Iterator[Server]:
    with running("--device", "cpu", "--model-id", str(tiny_folder)) as server:
        yield server


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def real(kind: str, real_server: Server) -> Iterator[Any]:
    """Each of the clients, connected to the real model."""
    client = open_client(kind, real_server.address)
    yield client
    client.close()


@pytest.fixture
def tiny(kind: str, tiny_server: Server) -> Iterator[Any]:
    """Each of the clients, connected to the tiny model."""
    client = open_client(kind, tiny_server.address)
    yield client
    client.close()
