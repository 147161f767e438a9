"""Writes locks/: for each environment every package with its version and the hashes of its files.

Run by `make lock`, and needed after a change of what an environment asks for. What is locked already keeps its version;
`make lock ARGS=--upgrade` takes the newest, `make lock ARGS='-P NAME'` that of one package.

- torch lies apart, for it comes in two builds. `make` takes the one for CPUs (locks/cpu.txt) where a machine has it at
  hand, and else the default one with the libraries that it needs on Linux (locks/cuda.txt).
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
    "explore": ("tests/explore/requirements.txt",),
    "ray": (
        "pyproject.toml",
        *("--extra=server", "--extra=ray", "tests/corpora/requirements.txt", "--constraint=locks/dev.txt"),
    ),
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
    _write("cuda", apart)
    _write("cpu", _cpu(*(entry for entry in apart if entry.startswith("torch=="))))


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


def _cpu(entry: str) -> set[str]:
    """Returns the entry of the same version's build for CPUs: that which pip finds here, or which is locked already."""
    pin = re.match(r"torch==\S+", entry)[0] + "+cpu"
    text = (LOCKS / "cpu.txt").read_text()
    hashes = set(re.findall(r"sha256:\w+", text)) if pin in text else set()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, pin])
        hashes |= {f"sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}" for wheel in Path(folder).iterdir()}
    if not hashes:
        sys.exit(f"{pin} is nowhere to be found: locks/cpu.txt was not written")
    return {" \\\n    ".join([pin, *(f"--hash={one}" for one in sorted(hashes))]) + "\n"}


def _write(name: str, entries: set[str]) -> None:
    (LOCKS / f"{name}.txt").write_text("# Made by `make lock`.\n" + "".join(sorted(entries)))


if __name__ == "__main__":
    main()
