"""A stand-in for the server that stops, or with --fail fails, while threads of it hang, as a tokenizer may."""

from __future__ import annotations

import asyncio
import concurrent.futures
import sys
import threading
from collections.abc import Callable

from layertap_server import cli
from layertap_server.config import Config


class HangingApp:
    """Serves nothing, and leaves two threads behind that never end."""

    http_url = metrics_url = ""

    def __init__(self, config: Config) -> None:
        self._executor = concurrent.futures.ThreadPoolExecutor(1)

    def prepare(self) -> None:
        pass

    async def serve(self, *, ready: Callable[[str], None]) -> None:
        asyncio.get_running_loop().run_in_executor(None, threading.Event().wait)
        self._executor.submit(threading.Event().wait)
        ready("127.0.0.1:0")
        if "--fail" in sys.argv:
            raise RuntimeError("it fails while it serves")


if __name__ == "__main__":
    sys.exit(cli.run(Config(), HangingApp))  # type: ignore[arg-type]
