"""Servers in processes of `.venv`, for tests that run in the environment `.cluster`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from layertap_server.testing import ServerProcess

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


class Server(ServerProcess):
    """A layertap-server in a process of `.venv`."""

    def _start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        python = str(ROOT / ".venv/bin/python")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([python, *arguments], env=os.environ | dict(environment), **pipes)
