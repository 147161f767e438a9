"""One side of a comparison in a process of its own: waits for orders on stdin, answers on stdout, one JSON a line."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Run = Callable[[list[str], int], Any]
"""Texts and max_length in; vectors [text_count, size], or a checksum where vectors are not the point."""


def serve(run: Run, describe: Callable[[], str]) -> None:
    """Runs orders until stdin ends."""
    import numpy as np

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        texts = json.loads(Path(order["texts"]).read_text())
        started = time.perf_counter()
        result = run(texts["texts"], texts["max_length"])
        seconds = time.perf_counter() - started
        if order.get("save") and isinstance(result, np.ndarray):
            np.save(order["save"], result)
        print(json.dumps({"seconds": seconds, "settings": describe()}), flush=True)


class Worker:
    """The other end: starts a side and gives it orders."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self.settings = ""
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def run(self, texts: Path, save: Path | None = None) -> float:
        """Returns the seconds that the texts took."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"texts": str(texts), "save": str(save) if save else None}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.settings = answer["settings"]
        return float(answer["seconds"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit(f"{self.name} ended without an answer")
