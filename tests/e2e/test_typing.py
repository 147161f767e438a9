"""The sample program of a user, which `make lint` type-checks: it is whole, and it runs."""

from __future__ import annotations

import ast
import dataclasses
import runpy
from pathlib import Path

import pytest
from support import ROOT, Server

import layertap

SAMPLE = ROOT / "tests" / "typing" / "sample.py"
CLASSES = [
    *(layertap.Client, layertap.AsyncClient, layertap.LayertapError, layertap.ModelInfo, layertap.Tokens),
    *(layertap.Embedding, layertap.HiddenStates, layertap.LayerRows, layertap.StreamResult, layertap.TorchEmbedding),
    *(layertap.Words, layertap.MixedRows),
]
OF_NO_NEED = {
    "ModelInfo": {field.name for field in dataclasses.fields(layertap.ModelInfo)},  # Plain facts, all alike.
    "Client": {"target", "shared_memory"},
    "AsyncClient": {"target", "shared_memory"},
}


def used() -> set[str]:
    """Returns every name and attribute in the sample."""
    nodes = list(ast.walk(ast.parse(SAMPLE.read_text())))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def test_the_sample_uses_all_that_is_exported() -> None:
    assert set(layertap.__all__) <= used()


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_the_sample_uses_every_public_member(kind: type) -> None:
    members = {name for base in kind.__mro__[:-1] for name in vars(base) if base.__module__.startswith("layertap")}
    public = {name for name in members if not name.startswith("_")} - OF_NO_NEED.get(kind.__name__, set())
    assert public <= used()


def test_the_sample_runs(real_server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(SAMPLE))["main"](real_server.address)
    assert capsys.readouterr().out.startswith(f"layertap {layertap.__version__}")


def test_users_get_the_types() -> None:
    assert (Path(layertap.__file__).parent / "py.typed").is_file()
