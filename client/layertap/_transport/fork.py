"""Forks: why a client goes on working in a child process, and when it cannot.

gRPC survives a fork only if the variable GRPC_ENABLE_FORK_SUPPORT said so when gRPC was imported; otherwise the first
call in a child would wait for threads that only the parent has. Importing layertap imports no gRPC and sets nothing:
the first call of a client does both, unless the program has set the variable or imported gRPC before.
"""

from __future__ import annotations

import os
import sys
from typing import Final

from layertap.errors import FailedPreconditionError

_VARIABLE: Final = "GRPC_ENABLE_FORK_SUPPORT"

_first_process: int | None = None
"""The process in which gRPC was used first, as far as layertap knows."""

_survived = False
"""Whether gRPC knew then that the process may be forked."""


def prepare() -> None:
    """Lets gRPC survive forks, if it is not imported yet. To be called before it is."""
    if "grpc" not in sys.modules:
        os.environ.setdefault(_VARIABLE, "1")


def check() -> None:
    """Notes that this process uses gRPC.

    Raises:
        FailedPreconditionError: if a parent has used gRPC, which was not told that the process would be forked.
    """
    global _first_process, _survived
    if _first_process is None:
        _first_process, _survived = os.getpid(), _survives()
    if _first_process != os.getpid() and not _survived:
        raise FailedPreconditionError(
            "this process was forked after a client had been used, and gRPC would hang; use a client before grpc "
            f"is imported, or set {_VARIABLE}=1 before Python starts, or start processes with spawn"
        )


def _survives() -> bool:
    return os.environ.get(_VARIABLE, "").lower() in ("1", "t", "true", "y", "yes")
