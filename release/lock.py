"""Writes locks/: for each environment every package with its version and the hashes of its files.

Run by `make lock`, and needed after a change of what an environment asks for. What is locked already keeps its version;
`make lock ARGS=--upgrade` takes the newest, `make lock ARGS='-P NAME'` that of one package.

- torch lies apart, for it comes in two builds under one version. The default build for Linux needs the libraries in
  locks/cuda.txt, the build for CPUs does not: `make` installs them only where pip has taken the former.
- What goes into one environment is locked against locks/dev.txt, so that versions agree.
- No index is named: pip takes the files from where it is set up to, and the hashes say whether they are right.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "locks"
UV = ROOT / ".lock/bin/uv"
BUILD = "build"
"""In place of a file: what builds the package, as pyproject.toml has it."""

ENVIRONMENTS = {
    "dev": ("pyproject.toml", "--extra=server", "--extra=otel", "--extra=dev", BUILD),
    "docs": ("pyproject.toml", "--extra=docs", "--constraint=locks/dev.txt"),
    "examples": ("pyproject.toml", "--extra=examples", "--constraint=locks/dev.txt"),
    "server": ("pyproject.toml", "--extra=server", "--extra=otel", "--extra=http", "--constraint=locks/dev.txt"),
    "dist": ("release/tools.txt",),
    "cluster": ("tests/cluster/requirements.txt",),
    "compat": ("tests/compat/requirements.txt",),
}
"""For each file in locks/ the arguments of `uv pip compile`."""

APART = re.compile(r"torch==|triton==|cuda-|nvidia-")


def main() -> None:
    apart: set[str] = set()
    for name, (source, *arguments) in ENVIRONMENTS.items():
        entries = _compiled(LOCKS / f"{name}.txt", source, arguments)
        apart |= {entry for entry in entries if APART.match(entry)}
        _write(name, entries - apart)
    (torch,) = (entry for entry in apart if entry.startswith("torch=="))
    _write("cuda", apart - {torch})
    _write("torch", {torch.rstrip() + "".join(f" \\\n    --hash=sha256:{one}" for one in _cpu(torch)) + "\n"})


def _compiled(lock: Path, source: str, arguments: list[str]) -> set[str]:
    """Returns the entries of a lock, torch's among them."""
    constraints = ["--constraint=constraints.txt"] if source == "pyproject.toml" else []
    command = [
        str(UV),
        "pip",
        "compile",
        "-q",
        "--universal",
        "--python-version=3.11",
        "--generate-hashes",
        "--no-header",
    ]
    command += ["--no-annotate", "--no-emit-index-url", "--no-emit-find-links", f"--output-file={lock}", *constraints]
    build = ""
    if BUILD in arguments:
        build = "\n".join(tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"])
        arguments = [*(one for one in arguments if one != BUILD), "-"]
    subprocess.run([*command, source, *arguments, *sys.argv[1:]], input=build, text=True, cwd=ROOT, check=True)
    return {*re.split(r"^(?=\w)", lock.read_text(), flags=re.MULTILINE)[1:]}


def _cpu(entry: str) -> list[str]:
    """Returns the hashes of torch's builds for CPUs: those locked at this version, and the one that pip finds."""
    version = re.match(r"torch==(\S+)", entry)[1]
    old = LOCKS / "torch.txt"
    locked = old.read_text() if old.exists() else ""
    found = {*re.findall(r"sha256:(\w+)", locked)} if f"torch=={version} " in locked else set()
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, f"torch=={version}"]
        subprocess.run(pip, check=True)
        (wheel,) = Path(folder).iterdir()
        found.add(hashlib.sha256(wheel.read_bytes()).hexdigest())
    return sorted(found - {*re.findall(r"sha256:(\w+)", entry)})


def _write(name: str, entries: set[str]) -> None:
    (LOCKS / f"{name}.txt").write_text("# Made by `make lock`.\n" + "".join(sorted(entries)))


if __name__ == "__main__":
    main()
