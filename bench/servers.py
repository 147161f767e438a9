"""Servers in processes of their own, as benchmarks start them. Each says its address on the first line it prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent


class Server:
    """A running server.

    Attributes:
        address: Where it listens.
    """

    def __init__(self, *command: str | Path) -> None:
        self._process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline().split()
        if not line:
            raise SystemExit(f"{' '.join(map(str, command))} did not start")
        self.address = line[-1]

    @property
    def process_id(self) -> int:
        return self._process.pid

    @property
    def memory_mb(self) -> float:
        return psutil.Process(self._process.pid).memory_info().rss / 2**20

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def kill(self) -> None:
        """Ends it as a crash would."""
        self._process.kill()
        self._process.wait(timeout=60)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=60)


def real(*flags: str) -> Server:
    """Starts the server as users do."""
    return Server(sys.executable, "-m", "layertap_server.cli", "--log-level", "error", *flags)


def stand_in(*flags: str) -> Server:
    """Starts a server whose encoder costs nothing; see stand_in.py."""
    return Server(sys.executable, HERE / "stand_in.py", "--log-level", "error", *flags)
