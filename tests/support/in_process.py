"""A whole server on a socket, in a thread of the test's own process. It imports torch.

It loads a tiny model in a tenth of a second, where a process takes seconds. Only synchronous clients may use it: gRPC's
asyncio serves one event loop of a process, which is the server's.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from layertap_server.app.server import App
from layertap_server.config import Config


@contextlib.contextmanager
def serving(folder: Path, **knobs: Any) -> Iterator[str]:
    """Serves a model on the CPU; yields the address."""
    app = App(Config(model_id=str(folder), device="cpu", port=0, **knobs))
    started: queue.Queue[tuple[str, Callable[[], object]]] = queue.Queue()

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        stopped: asyncio.Future[None] = loop.create_future()

        def stop() -> None:
            loop.call_soon_threadsafe(stopped.set_result, None)

        await app.serve(ready=lambda address: started.put((address, stop)), stop_signal=lambda: stopped)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    address, stop = started.get(timeout=60)
    try:
        yield address
    finally:
        stop()
        thread.join(timeout=60)
    assert not thread.is_alive()
