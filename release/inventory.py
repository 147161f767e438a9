"""Lists in dist/ what an installed layertap consists of: a CycloneDX SBOM, and a table of licences.

Run by `make dist`. The versions are those of .venv, with which the tests run; the extras are those that running
layertap may need.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

from environment import ROOT, make

EXTRAS = ("arrow", "explore", "http", "otel", "pandas", "plot", "progress", "server", "torch")
TOOLS = ROOT / ".dist/bin"


def main() -> None:
    (wheel,) = (ROOT / "dist").glob("*.whl")
    version = wheel.name.split("-")[1]
    sbom = ROOT / f"dist/layertap-{version}.cdx.json"
    licences = ROOT / f"dist/layertap-{version}.licences.md"
    with tempfile.TemporaryDirectory() as folder:
        python = str(make(Path(folder) / "runtime", wheel=wheel, extras=EXTRAS))
        project = ["--pyproject", str(ROOT / "pyproject.toml"), "--mc-type", "library"]
        _run("cyclonedx-py", "environment", python, *project, "--output-reproducible", "-o", str(sbom))
        _run(
            "pip-licenses",
            "--python",
            python,
            "--from",
            "mixed",
            "--format",
            "markdown",
            "--output-file",
            str(licences),
        )
    found = json.loads(sbom.read_text())
    found["metadata"]["component"]["version"] = version  # The tool reads no dynamic version.
    sbom.write_text(json.dumps(found, indent=2) + "\n")


def _run(tool: str, *arguments: str) -> None:
    subprocess.run([str(TOOLS / tool), *arguments], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
