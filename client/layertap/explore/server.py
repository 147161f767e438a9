"""Runs the page: a socket on loopback, a token, and uvicorn without a log."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable
from typing import Final

from layertap import optional_deps
from layertap.explore import neighbours, views
from layertap.explore.app import App, View
from layertap.explore.session import Session

HOST: Final = "127.0.0.1"

VIEWS: Final[dict[str, View]] = {
    "info": views.info,
    "tokens": views.tokens,
    "layers": views.layers,
    "change": views.change,
    "likeness": views.likeness,
    "map": views.map_,
    "attention": views.attention,
    "sentences": neighbours.read_file,
    "corpus": neighbours.embed,
    "nearest": neighbours.nearest,
}


def run(target: str, *, timeout_s: float, port: int, opened: Callable[[str], object]) -> None:
    """Serves the page on a port of loopback (0: any free one) until it is interrupted.

    Calls `opened` once with its address; `timeout_s` is the deadline of each call to the server, in seconds.

    Raises:
        InvalidArgumentError: if the target is wrong.
        ModuleNotFoundError: if uvicorn is missing; `layertap[explore]` brings it.
        OSError: if the port is in use.
    """
    optional_deps.load("uvicorn", extra="explore", purpose="layertap explore")
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((HOST, port))
        listening.listen()
        asyncio.run(_serve(listening, target, timeout_s, opened))


async def _serve(listening: socket.socket, target: str, timeout_s: float, opened: Callable[[str], object]) -> None:
    import uvicorn

    port = int(listening.getsockname()[1])
    token = secrets.token_urlsafe(24)
    session = Session(target, timeout_s=timeout_s)
    config = uvicorn.Config(
        App(VIEWS, session, token=token, port=port),
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=1,
    )
    try:
        opened(f"http://{HOST}:{port}/{token}/")
        await uvicorn.Server(config).serve(sockets=[listening])
    finally:
        await session.client.close()
