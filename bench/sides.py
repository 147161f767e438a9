"""layertap's own sides of the comparison: over gRPC to a server on loopback, and the bare engine in this process."""

from __future__ import annotations

import argparse
import os
import queue
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import worker


class OverGrpc:
    """Bulk pooled vectors, or all hidden states, by `embed_stream` from a server in a process of its own."""

    def __init__(self, folder: Path, what: str, flags: list[str]) -> None:
        from layertap import Client

        self._server = subprocess.Popen(
            [sys.executable, "-m", "layertap_server", "--port", "0", "--model-id", str(folder), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._server.stdout is not None
        self._client = Client(self._server.stdout.readline().split()[-1])
        self._what = what

    def __call__(self, texts: list[str], max_length: int) -> np.ndarray:
        options: dict[str, Any] = {"pooling": "mean"}
        if self._what == "layers":
            options = {"layers": "all"}
        elif self._what == "half":
            options = {"layers": [self._client.model_info().layer_count // 2]}
        elif self._what == "whole":
            options = {"layers": [-1]}
        vectors = []
        for result in self._client.embed_stream(texts, truncation="right", max_length=max_length, **options):
            embedding = result.embedding
            if embedding.pools:
                vectors.append(embedding.pooled[0])
            else:
                vectors.append(embedding.ragged(embedding.layers[-1])[0].mean(axis=0))
        return np.stack(vectors)

    def describe(self) -> str:
        return f"embed_stream, {self._what}"

    def close(self) -> None:
        self._client.close()
        self._server.terminate()
        self._server.wait(timeout=60)


class Engine:
    """The tokenizer, the batcher and the encoder as the server wires them, without gRPC."""

    def __init__(self, folder: Path, flags: list[str]) -> None:
        from layertap_server import cli
        from layertap_server.app.server import App

        self._config = cli.parse(["--model-id", str(folder), *flags], os.environ)
        self._app = App(self._config)
        self._app.prepare()

    def __call__(self, texts: list[str], max_length: int) -> np.ndarray:
        from layertap_server.model.tokenizer_engine import Tokenizing
        from layertap_server.scheduler.events import Event, RowsReady, RunDone
        from layertap_server.types import Output, OutputKind, Plan, Pool, Strategy

        tokenizer, batcher, model = self._app.tokenizer, self._app.parts.batcher, self._app.parts.model
        output = Output(
            kind=OutputKind.POOLED_VECTORS,
            layers=(model.layer_count,),
            row_size=model.hidden_size,
            pool=Pool(strategy=Strategy.MEAN),
        )
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        call = batcher.open(Plan(outputs=(output,), dtype="float32"), client="bench", deliver=events.put)
        for start in range(0, len(texts), 256):
            group = texts[start : start + 256]
            encoded = tokenizer.encode(group, group, Tokenizing(max_length=max_length, truncation="right"))
            call.add([one.text for one in encoded])
        vectors = np.empty((len(texts), model.hidden_size), np.float32)
        left = len(texts)
        while left:
            event = events.get()
            if isinstance(event, RowsReady):
                rows = np.frombuffer(event.rows.data, np.float32).reshape(-1, model.hidden_size)
                vectors[event.first_text : event.first_text + len(rows)] = rows
                call.release(len(event.rows.data))
            elif isinstance(event, RunDone):
                left -= len(event.texts)
                call.release(0, run_done=True)
        call.close()
        return vectors

    def describe(self) -> str:
        return "tokenizer, batcher and encoder without gRPC"

    def close(self) -> None:
        self._app.parts.batcher.stop(10)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["engine", "pooled", "layers", "half", "whole"])
    parser.add_argument("folder", type=Path)
    arguments, flags = parser.parse_known_args()
    side: Any = (
        Engine(arguments.folder, flags)
        if arguments.side == "engine"
        else OverGrpc(arguments.folder, arguments.side, flags)
    )
    run: Callable[..., Any] = side
    worker.serve(run, side.describe)
    side.close()
