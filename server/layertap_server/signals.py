"""Signals that stop the server, from the first line of the process on.

Python's own handlers are no use here: that of SIGINT raises an exception, which is lost inside a callback, and SIGTERM
has none, so that the kernel ignores it where the server is process 1 of a container. Imports nothing but the standard
library, because imports take seconds.

Rules:
- Until the server listens, and from the second signal on, a signal ends the process at once: SIGINT with exit code 130,
  the others with 0.
- While the server listens, the first signal begins the shutdown; see `app.lifecycle`.
- SIGHUP stays ignored where it is ignored at the start, as under nohup.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Final, NoReturn

INTERRUPTED: Final = 130
"""The exit code after SIGINT."""


def stopping() -> list[signal.Signals]:
    """Returns the signals that stop the server."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if ignores_hangup else [signal.SIGHUP])]


def install() -> None:
    """Lets each of the signals end the process at once."""
    for number in stopping():
        signal.signal(number, _end)


def restore() -> None:
    """Gives the signals their usual meaning in a program of Python."""
    for number in stopping():
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def leave(code: int) -> NoReturn:
    """Ends the process without waiting for threads, which may hang; writes what is printed and logged, if it can."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            getattr(stream, "drain", stream.flush)()
    os._exit(code)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    leave(INTERRUPTED if number == signal.SIGINT else 0)
