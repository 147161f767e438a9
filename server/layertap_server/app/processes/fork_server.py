"""The process that the processes of a server are forked from: it loads the model once, and they share its memory.

Rules:
- It has one thread and no GPU, or what is forked of it would not work.
- It ends when its socket closes, and ignores the signals that stop a server: the supervisor decides.
- What it forks becomes a child of the supervisor, which is the reaper of its descendants, so that the exit of each is
  seen there.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import select
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, Final, NoReturn, Protocol

from layertap_server import signals
from layertap_server.config import ConfigError


class Loaded(Protocol):
    """What is loaded once."""

    @property
    def fingerprint(self) -> str:
        """Tells it from all others."""


Load = Callable[[], Loaded]
"""Returns what is loaded once; raises ConfigError."""
Run = Callable[[Any, socket.socket, int], NoReturn]
"""Runs a process: what is loaded, its socket to the supervisor, and its number."""

_FORK_TIMEOUT_S: Final = 10.0
_PR_SET_CHILD_SUBREAPER: Final = 36


class ForkServerLostError(Exception):
    """The fork server has ended, or does not answer."""


class Child:
    """A child process of this one."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._handle = os.pidfd_open(pid)
        self._code: int | None = None

    @property
    def code(self) -> int | None:
        """The exit code, negative after a signal; None: it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
                os.close(self._handle)
        return self._code

    async def ended(self) -> int:
        """Waits until it has ended; returns the exit code. For one task at a time."""
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        if self.code is None:
            loop.add_reader(self._handle, readable.set)
            try:
                await readable.wait()
            finally:
                loop.remove_reader(self._handle)
        assert self.code is not None
        return self.code

    def wait(self) -> None:
        """Waits until it has ended."""
        if self.code is None:
            select.select([self._handle], [], [])
            assert self.code is not None

    def signal(self, number: signal.Signals) -> None:
        """Sends it a signal, if it still runs."""
        if self.code is None:
            signal.pidfd_send_signal(self._handle, number)


class ForkServer:
    """The fork server, as the supervisor sees it."""

    def __init__(self, load: Load, run: Run) -> None:
        """Starts it: there `load` is called at once, and `run` in each process that is forked of it."""
        reap_descendants()
        self._socket, requests = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        with warnings.catch_warnings():
            # The threads of this process write the log and show metrics; the child uses nothing of theirs.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if not pid:
            _run_fork_server(requests, load, run)
        requests.close()
        self._socket.setblocking(False)
        self.child = Child(pid)

    async def loaded(self) -> str:
        """Waits until processes can be forked; returns the fingerprint of what they have.

        Raises:
            ConfigError: if the model cannot be served.
            ForkServerLostError: if the fork server has ended.
        """
        answer = await asyncio.get_running_loop().sock_recv(self._socket, 1 << 16)
        if not answer:
            raise ForkServerLostError
        found: dict[str, str] = json.loads(answer)
        if "error" in found:
            raise ConfigError(found["error"])
        self._socket.settimeout(_FORK_TIMEOUT_S)
        return found["fingerprint"]

    def fork(self, number: int) -> tuple[Child, socket.socket]:
        """Starts a process; returns it, and the socket to it.

        Raises:
            ForkServerLostError: if the fork server has ended, or has not answered in time and is ended.
        """
        control, other = socket.socketpair()
        try:
            with other:
                socket.send_fds(self._socket, [str(number).encode()], [other.fileno()])
            if not (answer := self._socket.recv(64)):
                raise ForkServerLostError
            return Child(int(answer)), control
        except OSError as exc:
            control.close()
            self.kill()  # An answer that comes late would be taken for that to the next request.
            raise ForkServerLostError from exc

    def kill(self) -> None:
        """Ends it at once."""
        self.child.signal(signal.SIGKILL)


def _run_fork_server(requests: socket.socket, load: Load, run: Run) -> NoReturn:
    code = 1
    try:
        _forget(keep=requests.fileno())
        loaded = load()
        gc.collect()
        gc.freeze()  # Looking through it for garbage would copy the pages that it lies in.
        requests.send(json.dumps({"fingerprint": loaded.fingerprint}).encode())
        while True:
            data, descriptors, *_ = socket.recv_fds(requests, 64, 1)
            if not data:
                break
            pid = fork_twice()
            if not pid:
                requests.close()
                signals.install()
                run(loaded, socket.socket(fileno=descriptors[0]), int(data))
            os.close(descriptors[0])
            requests.send(str(pid).encode())
        code = 0
    except ConfigError as exc:
        requests.send(json.dumps({"error": str(exc)}).encode())
        code = 2
    except ConnectionError:
        code = 0  # The supervisor has ended.
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(code)


def _forget(*, keep: int) -> None:
    """Drops what belongs to the supervisor: its files, its loop's signals, and its threads' streams."""
    signal.set_wakeup_fd(-1)
    for number in signals.stopping():
        signal.signal(number, lambda *_: None)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != keep:
            try:
                os.close(int(name))
            except OSError:
                continue  # The one that the list was read with.
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


def reap_descendants() -> None:
    """Makes this process the parent of all its descendants whose own parents have ended. Linux alone can do that."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def fork_twice() -> int:
    """Forks a child of the process that reaps descendants; returns its id, or in it 0."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        os.waitpid(child, 0)
        with os.fdopen(reading) as pipe:
            return int(pipe.read())
    if grandchild := os.fork():
        os.write(writing, str(grandchild).encode())
        os._exit(0)
    os.close(reading)
    os.close(writing)
    return 0
