"""Servers that start by a fork of a process that has imported everything, which takes a quarter of the time.

Run as a script, this is that process: it imports the server, waits for requests on a socket and forks. It starts no
thread and opens no gRPC channel, so a fork of it is as good as a new process. A server is forked twice, so that it
becomes a child of the test process (Linux alone can do that; elsewhere `start` returns None).
"""

from __future__ import annotations

import functools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from layertap_server.app.processes.fork_server import fork_twice, reap_descendants

HARMLESS = ("GRPC_VERBOSITY", "LAYERTAP_", "OTEL_", "PYTEST_")
"""How variables begin that may differ from those that the forking process was started with: it has not read them."""


class ForkedProcess:
    """What a server needs of `subprocess.Popen`, for a process that was forked elsewhere."""

    def __init__(self, pid: int, stdout: int, stderr: int) -> None:
        self.pid, self.returncode = pid, None
        self.stdout, self.stderr = os.fdopen(stdout, "rb"), os.fdopen(stderr, "rb")
        self._handle = os.pidfd_open(pid)
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
                    os.close(self._handle)
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.poll() is None:
            if not select.select([self._handle], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self.poll()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class _Forker:
    """The forking process, as the tests see it."""

    def __init__(self) -> None:
        self._environment = dict(os.environ)
        self._lock = threading.Lock()
        reap_descendants()
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            command = [sys.executable, __file__, str(other.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[other.fileno()], stdin=subprocess.DEVNULL)

    def serves(self, environment: Mapping[str, str]) -> bool:
        names = self._environment.keys() | environment.keys()
        changed = (name for name in names if self._environment.get(name) != environment.get(name))
        return all(name.startswith(HARMLESS) for name in changed)

    def start(self, program: Sequence[str], environment: Mapping[str, str]) -> ForkedProcess:
        out, out_end = os.pipe()
        err, err_end = os.pipe()
        request = json.dumps({"program": program, "environment": dict(environment), "folder": os.getcwd()})
        try:
            with self._lock:
                socket.send_fds(self._socket, [request.encode()], [out_end, err_end])
                answer = self._socket.recv(64)
        finally:
            os.close(out_end)
            os.close(err_end)
        assert answer, "the process that forks servers has ended"
        return ForkedProcess(int(answer), out, err)

    def close(self) -> None:
        self._socket.close()
        self._process.wait(timeout=30)


@functools.cache
def _forker() -> _Forker:
    return _Forker()


def close() -> None:
    """Ends the forking process, if there is one."""
    if _forker.cache_info().currsize:
        _forker().close()
        _forker.cache_clear()


def start(program: Sequence[str], environment: Mapping[str, str]) -> ForkedProcess | None:
    """Starts a program of Python: a script's path, or `-m` and a module, then its arguments.

    Returns:
        Its process, or None if it has to be started without a fork.
    """
    if sys.platform != "linux" or not _forker().serves(environment):
        return None
    return _forker().start(program, environment)


def _fork(request: bytes, descriptors: Sequence[int]) -> int:
    """Forks as requested; returns the id of the new process, or in it 0."""
    if pid := fork_twice():
        return pid
    for number, descriptor in enumerate(descriptors, start=1):
        os.dup2(descriptor, number)
        os.close(descriptor)
    given = json.loads(request)
    os.environ.clear()
    os.environ.update(given["environment"])
    os.chdir(given["folder"])
    return 0


def _main(descriptor: int) -> None:
    import transformers

    import layertap_server.app.server
    import layertap_server.cli  # noqa: F401 - imported for the forks

    transformers.AutoTokenizer  # noqa: B018 - an attribute that imports
    with socket.socket(fileno=descriptor) as requests:
        while True:
            request, descriptors, *_ = socket.recv_fds(requests, 1 << 20, 2)
            if not request:
                return
            pid = _fork(request, descriptors)
            if not pid:
                break
            for one in descriptors:
                os.close(one)
            requests.send(str(pid).encode())
    program = json.loads(request)["program"]
    if program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(program)
        sys.path[0] = str(Path(program[0]).parent)
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    _main(int(sys.argv[1]))
