"""The rules of the server's code that CONTRIBUTING.md states and no linter checks."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SERVER = Path(__file__).parents[2] / "server" / "layertap_server"
MODULES = [path for path in sorted(SERVER.rglob("*.py")) if not path.stem.endswith("_pb2")]
MOST_LINES = 400


def name_of(path: Path) -> str:
    return str(path.relative_to(SERVER))


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield getattr(node, "lineno", 1), text


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_is_short_and_opens_with_what_it_does(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_docstrings_state_errors_with_their_condition(path: Path) -> None:
    for line, text in docstrings(ast.parse(path.read_text())):
        assert not text.startswith("Takes "), f"{path}:{line} says what it takes; state Args, or drop it"
        _, _, raises = text.partition("Raises:\n")
        for entry in re.findall(r"^    \w+(?:Error|Exception): .*", raises, re.MULTILINE):
            assert ": if " in entry, f"{path}:{line}: {entry.strip()}; write 'X: if …'"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_data_have_slots_and_are_not_dicts_with_known_keys(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            assert "TypedDict" not in [ast.unparse(base) for base in node.bases], f"{path}:{node.lineno}"
            for decorator in map(ast.unparse, node.decorator_list):
                if decorator.startswith("dataclasses.dataclass"):
                    assert "slots=True" in decorator, f"{path}:{node.lineno} is a dataclass without slots"
