"""Servers in processes of their own, as benchmarks start them. Each says its address on the first line it prints."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psutil

from layertap_server.testing import ServerProcess

HERE = Path(__file__).resolve().parent


class Server(ServerProcess):
    """A running server, stopped at the end of a `with` block."""

    @property
    def process_id(self) -> int:
        return self.process.pid

    @property
    def memory_mb(self) -> float:
        return psutil.Process(self.process.pid).memory_info().rss / 2**20

    @property
    def peak_memory_mb(self) -> float:
        """The most memory that it has taken."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Peer:
    """Another program that serves, run by a Python of its own."""

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

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=60)


def real(*flags: str) -> Server:
    """Starts the server as users do."""
    return Server("--log-level", "error", *flags)


def stand_in(*flags: str) -> Server:
    """Starts a server whose encoder costs nothing; see stand_in.py."""
    return Server("--log-level", "error", *flags, program=[str(HERE / "stand_in.py")])
