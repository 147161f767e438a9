"""A layertap-server that believes to have a cuda device, and logs which processes ask torch for it. For tests alone.

The CPU computes. Takes the flags of layertap-server.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from layertap_server import cli
from layertap_server.app.server import App
from layertap_server.engine.encoder import Encoder

_ANSWERS = {
    "_lazy_init": None,
    "current_device": 0,
    "device_count": 1,
    "get_device_capability": (9, 0),
    "init": None,
    "is_available": True,
    "mem_get_info": (1 << 30, 2 << 30),
}


def _say(line: str) -> None:
    """Writes a line at once: the server's own stderr is written by a thread, so lines of two change places."""
    os.write(2, f"{line}\n".encode())


def _asked(name: str, answer: Any) -> Callable[..., Any]:
    def ask(*_arguments: object, **_options: object) -> Any:
        _say(f"cuda: {os.getpid()} {name}")
        return answer

    return ask


def _encoder(*arguments: Any, device: str, dtype: str, **options: Any) -> Encoder:
    assert (device, dtype) == ("cuda:0", "bfloat16")
    torch.cuda.init()
    try:
        return Encoder(*arguments, device="cpu", dtype="float32", **options)
    finally:
        _say(f"made: {os.getpid()}")


def main() -> int:
    for name, answer in _ANSWERS.items():
        setattr(torch.cuda, name, _asked(name, answer))
    return cli.run(cli.parse(sys.argv[1:], os.environ), functools.partial(App, make_encoder=_encoder))


if __name__ == "__main__":
    sys.exit(main())
