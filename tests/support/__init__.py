"""What the tests share: servers in processes of their own, both clients behind one interface, sizes and bounds.

Nothing in this module imports torch, because the unit tests use it; `support.oracle` is for the other rings.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from layertap import AsyncClient, Client
from layertap_server.parity.compare import BOUNDS
from layertap_server.testing import ServerProcess
from support import forks

ROOT = Path(__file__).parents[2]
"""The checkout."""

STOP_TIMEOUT_S = 60.0

PROCESSES = int(os.environ.get("LAYERTAP_PROCESSES", "1"))
"""How many processes a server has that the tests start without the flag."""

BOUND = BOUNDS["float32"]
"""How far any number may be from the oracle's, in float32."""

BASE_SETTINGS = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
TINY_SETTINGS = BASE_SETTINGS | {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def poll(condition: Callable[[], bool], *, timeout_s: float = 60.0) -> None:
    """Waits for what no event tells, but not for ever."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.01)


class Server(ServerProcess):
    """A layertap-server, or a script that makes one, in a process of its own, on a free loopback port."""

    def __init__(self, *flags: str, environment: dict[str, str] | None = None, script: Path | None = None) -> None:
        program = {"program": [str(script)]} if script else {}
        super().__init__(*flags, environment=environment, stop_timeout_s=STOP_TIMEOUT_S, **program)

    def _start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> Any:
        return forks.start(arguments, environment) or super()._start(arguments, environment)

    @property
    def log(self) -> bytes:
        """What it has logged so far."""
        return super().log.encode()

    @contextlib.contextmanager
    def logging(self, words: str) -> Iterator[None]:
        """Waits, at its end, until each process of the server has logged these words since its start."""
        start = len(self.log)
        line = re.compile(re.escape(words.encode()) + rb"[^\n]*?(?: process=(\d+))?\n")
        yield
        poll(lambda: len(set(line.findall(self.log, start))) == PROCESSES)


@contextlib.contextmanager
def running(*flags: str, environment: dict[str, str] | None = None, script: Path | None = None) -> Iterator[Server]:
    """Runs a server and checks that it ends well."""
    server = Server(*flags, environment=environment, script=script)
    try:
        yield server
    except BaseException:
        server.kill()
        raise
    code = server.stop()
    assert code == 0, server.log.decode()
    assert b"Traceback" not in server.log, server.log.decode()


class BlockingAsyncClient:
    """`AsyncClient` with the face of `Client`, so that one suite drives both."""

    def __init__(self, target: str, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(target, **options)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if not callable(method):
            return method

        def call(*args: Any, **kwargs: Any) -> Any:
            made = method(*args, **kwargs)
            return self._runner.run(_gather(made) if inspect.isasyncgen(made) else made)

        return call

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


async def _gather(items: Any) -> list[Any]:
    return [item async for item in items]


def open_client(kind: str, target: str, **options: Any) -> Any:
    return Client(target, **options) if kind == "sync" else BlockingAsyncClient(target, **options)


def write_settings(folder: Path, settings: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def worst(found: np.ndarray, wanted: np.ndarray) -> float:
    """Returns the largest difference; arrays of other shapes are infinitely far apart."""
    assert found.dtype == np.float32
    return float(np.abs(found - wanted).max(initial=0.0)) if found.shape == wanted.shape else float("inf")
