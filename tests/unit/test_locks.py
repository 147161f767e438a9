"""The locks hold what is asked for, with hashes and without an index; `make lock` writes them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKS = sorted((ROOT / "locks").glob("*.txt"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _locked(*names: str) -> dict[str, set[str]]:
    """Returns the versions of each package; one that depends on the platform may have several."""
    found: dict[str, set[str]] = {}
    for name in names:
        for package, version in re.findall(r"^([\w.-]+)==(\S+)", (ROOT / f"locks/{name}.txt").read_text(), re.M):
            found.setdefault(package, set()).add(version)
    return found


def _extras(*names: str) -> list[str]:
    extras = PROJECT["project"]["optional-dependencies"]
    return PROJECT["project"]["dependencies"] + [line for name in names for line in extras[name]]


def _lines(path: str) -> list[str]:
    return [line for line in (ROOT / path).read_text().splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize(
    ("lock", "wanted"),
    [
        ("dev", _extras("server", "otel", "dev") + PROJECT["build-system"]["requires"] + _lines("constraints.txt")),
        ("docs", _extras("docs")),
        ("examples", _extras("examples")),
        ("server", _extras("server", "otel", "http")),
        ("dist", _lines("release/tools.txt")),
        ("cluster", _lines("tests/cluster/requirements.txt")),
        ("explore", _lines("tests/explore/requirements.txt")),
        ("ray", _extras("server", "ray") + _lines("tests/corpora/requirements.txt")),
        ("compat", _lines("tests/compat/requirements.txt")),
    ],
)
def test_what_is_asked_for_is_locked(lock: str, wanted: list[str]) -> None:
    locked = _locked(lock, "cuda")
    for requirement in map(Requirement, wanted):
        versions = locked.get(canonicalize_name(requirement.name), set())
        assert versions, f"{requirement} is not in locks/{lock}.txt: run `make lock`"
        assert all(map(requirement.specifier.contains, versions)), f"{requirement}, locked: {versions}; run `make lock`"


@pytest.mark.parametrize("lock", ["docs", "examples", "server"])
def test_what_shares_an_environment_or_is_shipped_has_the_versions_that_are_tested(lock: str) -> None:
    tested, found = _locked("dev"), _locked(lock)
    assert found.keys() & tested.keys() >= {"numpy", "grpcio", "protobuf"}
    assert all(found[name] == tested[name] for name in found.keys() & tested.keys())


def test_torch_is_locked_in_both_builds() -> None:
    assert {f"{version}+cpu" for version in _locked("cuda")["torch"]} == _locked("cpu")["torch"]


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_every_package_has_hashes_and_no_index_is_named(path: Path) -> None:
    text = path.read_text()
    entries = re.split(r"^(?=\w)", text, flags=re.M)[1:]
    assert entries and "://" not in text and "--index" not in text and "--find" not in text
    assert all(re.fullmatch(r"\S+==.+?( \\\n +--hash=sha256:[0-9a-f]{64})+\n", entry) for entry in entries)
