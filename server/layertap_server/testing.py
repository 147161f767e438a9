"""A real server for tests, benchmarks and demonstrations, in a process of its own, on a free loopback port.

Rules:
- The parent imports no torch: only the process of the server does.
- What the server logs is read all the time, so that a full pipe never stops it.
- Nothing outlives the block: the process is stopped, and killed if it does not stop.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

_SERVER: Final = ("-m", "layertap_server")


class ServerError(Exception):
    """The server did not start, or did not end with exit code 0; the message has its log."""


class ServerProcess:
    """A server in a process of its own.

    Attributes:
        address: Where it listens, as a client's target: `host:port`, or `unix:/path`.
        process: The process.
    """

    def __init__(
        self,
        *flags: str,
        program: Sequence[str] = _SERVER,
        environment: Mapping[str, str] | None = None,
        start_timeout_s: float = 120.0,
        stop_timeout_s: float = 60.0,
    ) -> None:
        """Starts the server and waits until it listens; for the arguments see `running_server`.

        Raises:
            ServerError: if it did not start.
        """
        self._stop_timeout_s = stop_timeout_s
        self._log: list[bytes] = []
        self.process = self._start([*program, "--port", "0", *flags], {**os.environ, **(environment or {})})
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        try:
            self.address = self._wait_for_address(start_timeout_s)
        except BaseException:
            self.kill()
            raise

    @property
    def log(self) -> str:
        """What the server has logged so far."""
        return b"".join(self._log).decode(errors="replace")

    def signal(self, number: int) -> None:
        """Sends a signal, such as `signal.SIGTERM`, to the process."""
        self.process.send_signal(number)

    def stop(self) -> int:
        """Stops the server as a supervisor does, by SIGTERM; returns its exit code.

        Raises:
            subprocess.TimeoutExpired: It did not end in time.
        """
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        return self._end()

    def kill(self) -> int:
        """Ends the server as a crash does, by SIGKILL; returns its exit code."""
        self.process.kill()
        return self._end()

    def _start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )

    def _end(self) -> int:
        code = self.process.wait(timeout=self._stop_timeout_s)
        self._reader.join(timeout=self._stop_timeout_s)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe:
                pipe.close()
        return code

    def _read_log(self) -> None:
        assert self.process.stderr
        while chunk := os.read(self.process.stderr.fileno(), 1 << 16):
            self._log.append(chunk)

    def _wait_for_address(self, timeout_s: float) -> str:
        assert self.process.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            found = bool(selector.select(timeout_s))
        words = self.process.stdout.readline().decode().split() if found else []
        if words:
            return words[-1]
        why = "it ended" if found else f"it did not listen within {timeout_s:g} s"
        self.kill()
        raise ServerError(f"the server did not start: {why}. Its log:\n{self.log}")


@contextlib.contextmanager
def running_server(
    *flags: str,
    program: Sequence[str] = _SERVER,
    environment: Mapping[str, str] | None = None,
    start_timeout_s: float = 120.0,
    stop_timeout_s: float = 60.0,
) -> Iterator[ServerProcess]:
    """Runs a server for a `with` block and stops it at the end.

    ```python
    with running_server("--model-id", "models/my-bert") as server, layertap.Client(server.address) as client:
        assert client.embed("Hello").last_hidden_state.shape[2] == 384
    ```

    Args:
        flags: Flags of `layertap-server`. `--port 0`, a free port, stands before them.
        program: What Python runs in place of `layertap-server`; the first line that it prints ends with its address.
        environment: Variables beside those of this process.
        start_timeout_s: How long it may take to listen, in seconds.
        stop_timeout_s: How long it may take to end, in seconds.

    Yields:
        The running server.

    Raises:
        ServerError: if it did not start, or ended with another exit code than 0.
    """
    server = ServerProcess(
        *flags,
        program=program,
        environment=environment,
        start_timeout_s=start_timeout_s,
        stop_timeout_s=stop_timeout_s,
    )
    try:
        yield server
        if code := server.stop():
            raise ServerError(f"the server ended with exit code {code}. Its log:\n{server.log}")
    except BaseException:
        server.kill()
        raise
