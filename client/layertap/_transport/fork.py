"""Forks: why a client goes on working in a child process, and when it cannot.

gRPC lives through a fork only if it was told so before it was imported, by the variable GRPC_ENABLE_FORK_SUPPORT;
otherwise the first call in a child would wait for threads that only the parent has. So layertap sets it, unless the
user has, or has imported gRPC first. That is the one thing that importing layertap does.
"""

from __future__ import annotations

import os
import sys
from typing import Final

from layertap.errors import FailedPreconditionError

_VARIABLE: Final = "GRPC_ENABLE_FORK_SUPPORT"

if "grpc" not in sys.modules:
    os.environ.setdefault(_VARIABLE, "1")

_SURVIVED: Final = os.environ.get(_VARIABLE, "").lower() in ("1", "t", "true", "y", "yes")

_first_process: int | None = None
"""The process in which gRPC was used first, as far as layertap knows."""


def check() -> None:
    """Notes that this process uses gRPC.

    Raises:
        FailedPreconditionError: A parent has used it, and gRPC was not told that it would be forked.
    """
    global _first_process
    if _first_process is None:
        _first_process = os.getpid()
    if _first_process != os.getpid() and not _SURVIVED:
        raise FailedPreconditionError(
            "this process was forked after a client had been used, and gRPC would hang; import layertap before grpc, "
            f"or set {_VARIABLE}=1 before Python starts, or start processes with spawn"
        )
