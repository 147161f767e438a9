"""Makes an environment that has what an installed layertap with some extras has, and nothing else.

What the extras require, and what that requires in turn, is linked from .venv, so that neither a download nor
a copy of torch is needed. A requirement that is missing or of another version is an error.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def make(folder: Path, *, wheel: Path, extras: Iterable[str]) -> Path:
    """Makes the environment, which must not be there yet, and installs the wheel; returns its interpreter."""
    venv.create(folder, symlinks=True)
    python = folder / "bin/python"
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    for found in required(wheel, extras):
        _link(found, site)
    install(python, "--no-deps", str(wheel))
    return python


def install(python: Path, *arguments: str) -> None:
    """Runs `pip install` for another interpreter, which needs no pip of its own."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", *arguments]
    subprocess.run(command, check=True, stdout=sys.stderr)


def required(wheel: Path, extras: Iterable[str]) -> list[Distribution]:
    """Returns all that the wheel needs with these extras, from what this interpreter has.

    Raises:
        LookupError: if a package is missing, or its version is not the one that is required.
    """
    installed: dict[str, Distribution] = {}
    for one in distributions():
        installed.setdefault(_normal(one.name), one)
    (root,) = distributions(path=[str(wheel)])
    seen: set[tuple[str, frozenset[str]]] = set()
    pending = [(root, frozenset(extras))]
    found: dict[str, Distribution] = {}
    while pending:
        needing, wanted = pending.pop()
        for requirement in map(Requirement, needing.requires or ()):
            if requirement.marker and not any(requirement.marker.evaluate({"extra": one}) for one in {"", *wanted}):
                continue
            name, of_it = _normal(requirement.name), frozenset(requirement.extras)
            needed = installed.get(name)
            if needed is None or not requirement.specifier.contains(needed.version, prereleases=True):
                version = needed.version if needed else "missing"
                raise LookupError(f"{needing.name} requires {requirement}, which is {version}; run `make install`")
            found[name] = needed
            if (name, of_it) not in seen:
                seen.add((name, of_it))
                pending.append((needed, of_it))
    return list(found.values())


def _link(package: Distribution, site: Path) -> None:
    """Links whole packages where that is possible; namespaces hold those of several distributions."""
    files = [one for one in package.files or () if ".." not in one.parts and "__pycache__" not in one.parts]
    packages = {one.parent for one in files if one.name == "__init__.py"}
    for one in files:
        top = next((parent for parent in reversed(one.parents) if parent in packages), one)
        if not (site / top).exists():
            (site / top).parent.mkdir(parents=True, exist_ok=True)
            (site / top).symlink_to(Path(str(package.locate_file(top))).resolve())


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
