"""One of the processes of a server, forked with the model loaded: it serves when the supervisor says so.

It drains at the first signal that stops a server, and when the supervisor is gone. Further signals have no effect: a
terminal and a service manager send them to all processes, and the supervisor decides when to end at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import traceback
from collections.abc import AsyncIterator
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING, Any, Final, NoReturn

from layertap_server import signals
from layertap_server.app import lifecycle
from layertap_server.app.processes.control import Control
from layertap_server.config import ConfigError
from layertap_server.observability.bounded_streams import bounded_streams
from layertap_server.types import EngineLostError

if TYPE_CHECKING:
    from layertap_server.app.server import App

log = logging.getLogger(__name__)

_OOM_SCORE: Final = Path("/proc/self/oom_score_adj")
_OOM_SCORE_MORE: Final = 200
"""So many thousandths of the memory count as taken by a process that serves, besides what it has."""


def run(app: App, end: socket, number: int) -> NoReturn:
    """Serves, then ends the process: with 0, or with 1 if it has failed."""
    code = 1
    _go_first_where_memory_is_short()
    with bounded_streams():
        try:
            asyncio.Runner().run(_serve(app, end, number))
            code = 0
        except ConfigError:
            pass  # The supervisor has been told.
        except EngineLostError as exc:
            log.error("%s", exc)
        except Exception:
            traceback.print_exc()
        signals.leave(code)


def _go_first_where_memory_is_short() -> None:
    """Lets the system kill this process before the supervisor and the one that it was forked from.

    That one is as large, and to load the model again would take the memory of the weights once more.
    """
    with contextlib.suppress(OSError):
        score = int(_OOM_SCORE.read_text())
        _OOM_SCORE.write_text(str(min(score + _OOM_SCORE_MORE, 1000)))


async def _serve(app: App, end: socket, number: int) -> None:
    control = await Control.open(end)
    try:
        app.prepare(process=number)
        gc.collect()
        gc.freeze()
        control.send("loaded")
        messages = control.messages()
        if await anext(messages, None) is None:
            return
        following: list[asyncio.Task[None]] = []

        def stop_signal() -> asyncio.Future[None]:
            stopped = lifecycle.stop_signal(once=False)
            following.append(asyncio.create_task(_follow(app, control, messages, stopped)))
            return stopped

        await app.serve(
            ready=lambda address: control.send("serving", {"address": address, "http_url": app.http_url}),
            stop_signal=stop_signal,
        )
    except ConfigError as exc:
        control.send("error", str(exc))
        raise
    finally:
        await control.flushed()


async def _follow(
    app: App, control: Control, messages: AsyncIterator[tuple[str, Any]], stopped: asyncio.Future[None]
) -> None:
    """Answers the supervisor until it is gone, and then stops this process too."""
    async for name, _ in messages:
        if name == "probe":
            control.send(name)
        if name == "metrics" and (metrics := app.parts.metrics) is not None:
            control.send("metrics", await asyncio.to_thread(metrics.snapshot))
    if not stopped.done():
        stopped.set_result(None)
