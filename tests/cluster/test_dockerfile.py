"""hadolint finds nothing in the Dockerfile; images are built where there is an engine."""

from __future__ import annotations

import subprocess
from pathlib import Path

from cluster.servers import DEPLOY, ROOT

HADOLINT = ROOT / ".cluster/bin/hadolint"


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([HADOLINT, DEPLOY / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def test_hadolint_finds_what_is_wrong(tmp_path: Path) -> None:
    wrong = tmp_path / "Dockerfile"
    wrong.write_text("FROM python:3.11-slim\nRUN cd /tmp && pip install torch\n")
    done = subprocess.run([HADOLINT, wrong], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "DL3013" in done.stdout
