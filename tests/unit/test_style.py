"""The rules of the code that CONTRIBUTING.md states and no linter checks."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLIENT, SERVER = ROOT / "client" / "layertap", ROOT / "server" / "layertap_server"
GENERATED = ("_pb2", "_pb2_grpc")
MODULES = [
    path
    for package in (CLIENT, SERVER)
    for path in sorted(package.rglob("*.py"))
    if not path.stem.endswith(GENERATED) and path.read_text()
]
RESULTS = [*sorted((CLIENT / "results").glob("*.py")), CLIENT / "types.py", CLIENT / "model_info.py"]
MOST_LINES = 300


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield getattr(node, "lineno", 1), text


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_is_short_and_opens_with_what_it_does(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES
    assert ast.get_docstring(parsed(path)), f"{path} has no docstring"


@pytest.mark.parametrize("path", sorted((CLIENT / "explore/static").glob("*.js")), ids=name_of)
def test_a_module_of_the_page_is_short_and_opens_with_what_it_does(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 300 and re.match(r"// .*\w", lines[0])


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_docstrings_state_errors_with_their_condition(path: Path) -> None:
    for line, text in docstrings(parsed(path)):
        assert not text.startswith("Takes "), f"{path}:{line} says what it takes; state Args, or drop it"
        _, _, raises = text.partition("Raises:\n")
        for entry in re.findall(r"^    \w+(?:Error|Exception): .*", raises, re.MULTILINE):
            assert ": if " in entry, f"{path}:{line}: {entry.strip()}; write 'X: if …'"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_data_have_slots_and_are_not_dicts_with_known_keys(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ClassDef):
            # The options of a method are one, so that type checkers know them where it passes them on.
            public = {CLIENT, SERVER / "offline"}  # What users call.
            is_options = node.name.endswith("Options") and public & set(path.parents)
            assert is_options or "TypedDict" not in map(ast.unparse, node.bases), f"{path}:{node.lineno}"
            for decorator in map(ast.unparse, node.decorator_list):
                if decorator.startswith("dataclasses.dataclass"):
                    assert "slots=True" in decorator, f"{path}:{node.lineno} is a dataclass without slots"


@pytest.mark.parametrize("path", RESULTS, ids=name_of)
def test_every_array_of_a_result_has_its_shape(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ClassDef):
            described = ast.get_docstring(node) or ""
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and _holds_arrays(field.annotation):
                    name = ast.unparse(field.target)
                    entry = re.search(rf"^    {name}: (.*\n(?:        .*\n)*)", described + "\n", re.MULTILINE)
                    assert name.startswith("_") or (entry and "Shape" in entry[1]), f"{path}:{field.lineno}: {name}"
                elif isinstance(field, ast.FunctionDef) and field.returns and _holds_arrays(field.returns):
                    text = (ast.get_docstring(field) or "").lower()
                    assert field.name.startswith("_") or "shape" in text, f"{path}:{field.lineno}: {field.name}"


def _holds_arrays(annotation: ast.expr) -> bool:
    return any(name in ast.unparse(annotation) for name in ("FloatArray", "IntArray", "BoolArray", "Tensor"))
