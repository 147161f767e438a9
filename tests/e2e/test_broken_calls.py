"""What goes wrong on the way: servers that are not there, hang or die, deadlines, and callers that leave."""

from __future__ import annotations

import asyncio
import itertools
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from support import Server, open_client, running
from support.refusals import GOOD, PATIENCE_S, SECRET, check_message, refused

from layertap import AsyncClient, Client
from layertap.errors import DeadlineExceededError, FailedPreconditionError, UnavailableError


def test_no_server_listens(kind: str) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # Bound and not listening: refused, and no other process can take the port.
        target = f"127.0.0.1:{held.getsockname()[1]}"
        client = open_client(kind, target)
        for call in (
            lambda: client.embed(SECRET),
            lambda: client.embed(SECRET, pooling="mean"),
            lambda: list(client.embed_layers(SECRET)),
            lambda: client.tokenize(SECRET),
            lambda: client.decode([101]),
            lambda: client.model_info(),
            lambda: list(client.embed_stream([SECRET], reconnect_timeout_s=0.2)),
        ):
            began = time.monotonic()
            refused(UnavailableError, call, target, "layertap-server")
            assert time.monotonic() - began < PATIENCE_S
        client.close()


def test_the_deadline_passes(tiny: Any) -> None:
    inputs = ["paris " * 500] * 200
    for call in (
        lambda: tiny.embed(inputs, layers="all", timeout_s=0.01),
        lambda: tiny.embed(inputs, pooling="mean", timeout_s=0.01),
        lambda: list(tiny.embed_layers(inputs, timeout_s=0.01)),
        lambda: tiny.tokenize(["a " * 50_000] * 200, max_length=100_000, timeout_s=0.01),
    ):
        began = time.monotonic()
        refused(DeadlineExceededError, call, "timeout_s")
        assert time.monotonic() - began < PATIENCE_S


def test_the_deadline_passes_while_a_server_hangs(tiny_folder: Path) -> None:
    """And when it goes on, it has forgotten those who left."""
    with running("--device", "cpu", "--model-id", str(tiny_folder)) as server, Client(server.address) as client:
        client.embed(GOOD)
        server.signal(signal.SIGSTOP)
        try:
            refused(DeadlineExceededError, lambda: client.embed(SECRET, timeout_s=0.3), "timeout_s", "0.3")
            call = lambda: list(client.embed_stream([SECRET], item_timeout_s=0.3))  # noqa: E731
            refused(DeadlineExceededError, call, "item_timeout_s", "0.3")
        finally:
            server.signal(signal.SIGCONT)
        assert client.embed(GOOD).token_counts.tolist() == [5]


def test_a_cancelled_task_is_cancelled(tiny_server: Server) -> None:
    async def main() -> None:
        async with AsyncClient(tiny_server.address) as other:
            inputs = ["paris " * 500] * 500
            task = asyncio.create_task(other.embed(inputs, layers="all"))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(task), 0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await other.embed(GOOD)).token_counts.tolist() == [5]

    asyncio.run(main())


def test_leaving_an_iteration_ends_the_call(tiny_server: Server) -> None:
    inputs = ["paris " * 500] * 500
    with Client(tiny_server.address) as other:
        for part in other.embed_layers(inputs):
            assert part.layer == 0
            break
        for result in other.embed_stream(itertools.repeat(GOOD)):
            assert result.error is None
            break
        assert other.embed(GOOD).token_counts.tolist() == [5]


def test_a_server_that_dies_ends_every_call(tiny_folder: Path) -> None:
    """A blocking and an asyncio caller each in the middle of layers, of a stream, and of a call not yet answered."""
    server = Server("--device", "cpu", "--model-id", str(tiny_folder))
    inputs = [[101, *[2_000] * 498, 102]] * 300  # 77 MB of layers: more than any buffer on the way holds.
    try:
        began = [threading.Event() for _ in range(6)]

        def layers() -> None:
            with Client(server.address) as client:
                for _ in client.embed_layers(inputs):
                    began[0].set()
                    killed.wait()

        async def alayers() -> None:
            async with AsyncClient(server.address) as client:
                async for _ in client.embed_layers(inputs):
                    began[1].set()
                    await asyncio.to_thread(killed.wait)

        def stream() -> None:
            with Client(server.address) as client:
                for _ in client.embed_stream(itertools.repeat(GOOD), reconnect_timeout_s=0.5):
                    began[2].set()

        async def astream() -> None:
            async with AsyncClient(server.address) as client:
                async for _ in client.embed_stream(itertools.repeat(GOOD), reconnect_timeout_s=0.5):
                    began[3].set()

        def whole() -> None:
            with Client(server.address) as client:
                client.model_info()  # It is connected: what meets a stopped server before that says so in other words.
                began[4].set()
                stopped.wait()
                client.embed([f"{SECRET} {GOOD}"], pooling="mean")

        async def awhole() -> None:
            async with AsyncClient(server.address) as client:
                await client.model_info()
                began[5].set()
                await asyncio.to_thread(stopped.wait)
                await client.embed([f"{SECRET} {GOOD}"], layers="all")

        stopped, killed = threading.Event(), threading.Event()
        with ThreadPoolExecutor(6) as pool:
            late = [pool.submit(whole), pool.submit(lambda: asyncio.run(awhole()))]
            futures = [
                pool.submit(layers),
                pool.submit(lambda: asyncio.run(alayers())),
                pool.submit(stream),
                pool.submit(lambda: asyncio.run(astream())),
            ]
            try:
                assert all([event.wait(PATIENCE_S) for event in began])
                server.signal(signal.SIGSTOP)
                stopped.set()
                assert not wait(late, timeout=0.5).done  # A stopped server answers no call.
            finally:
                server.signal(signal.SIGKILL)
                stopped.set(), killed.set()
            dead_at = time.monotonic()
            for future in [*futures, *late]:
                error = future.exception(timeout=PATIENCE_S)
                assert type(error) is UnavailableError
                check_message(error.details, server.address)
                assert "broke; repeat the call" in error.details or "layertap-server" in error.details
            assert time.monotonic() - dead_at < PATIENCE_S
    finally:
        server.kill()


def test_a_closed_client(kind: str, tiny_server: Server) -> None:
    closed = open_client(kind, tiny_server.address)
    closed.model_info()
    if kind == "sync":
        closed.close()
        for call in (
            lambda: closed.embed(SECRET),
            lambda: closed.tokenize(SECRET),
            lambda: list(closed.embed_layers(SECRET)),
            lambda: list(closed.embed_stream([SECRET])),
            lambda: closed.model_info(),
        ):
            refused(FailedPreconditionError, call, "closed", "new one")
        closed.close()  # Twice is once.
        return

    async def main() -> None:
        other = AsyncClient(tiny_server.address)
        await other.model_info()
        await other.close()
        await other.close()

        async def layers() -> None:
            async for _ in other.embed_layers(SECRET):
                raise AssertionError("a closed client gave rows")

        async def stream() -> None:
            async for _ in other.embed_stream([SECRET]):
                raise AssertionError("a closed client gave a result")

        for make in (lambda: other.embed(SECRET), lambda: other.tokenize(SECRET), other.model_info, layers, stream):
            with pytest.raises(FailedPreconditionError, match=r"closed.*new one"):
                await make()

    closed.close()
    asyncio.run(main())
