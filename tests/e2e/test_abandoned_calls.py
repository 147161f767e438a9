"""What a caller leaves in the middle: by an error, as garbage, with Ctrl-C, or with too little time."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import itertools
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import grpc
import pytest
from support import Server, poll

from layertap import AsyncClient, CancelledError, Client, DeadlineExceededError, UnavailableError
from layertap._protocol.stream_state import StreamState
from layertap._transport.connections import BUSY_CALL_COUNT
from layertap._transport.duplex import DuplexChannel
from layertap._transport.settings import StreamSettings, resolve
from layertap._transport.stream_calls import Endpoint, StreamCalls, StreamProgress
from layertap.v1 import embedding_pb2 as pb

WAIT_S = 30.0


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Lets garbage be collected where the test says so alone."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def into_garbage(value: object) -> None:
    """Leaves a value to the garbage collection: it is part of a circle."""
    circle = [value]
    circle.append(circle)


def done_in_time(work: Callable[[], object]) -> bool:
    """Runs it in a thread; returns whether it ended, which it might never do."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(WAIT_S)
    return not thread.is_alive()


def test_an_error_in_the_body_of_a_loop_ends_an_asyncio_stream_in_silence(
    tiny_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with AsyncClient(tiny_server.address) as client:
            stream = client.embed_stream(itertools.repeat("x"), pooling="mean")
            async for result in stream:
                raise ArithmeticError(result.index)

    with caplog.at_level(logging.INFO, "asyncio"), pytest.raises(ArithmeticError):
        asyncio.run(main())
    assert not caplog.messages


def test_a_stream_may_be_collected_in_its_own_thread(tiny_server: Server, no_collection: None) -> None:
    abandoned, collected = threading.Event(), threading.Event()

    def collect(*_: object) -> None:
        if abandoned.is_set() and not collected.is_set() and threading.current_thread().name == "layertap-stream":
            collected.set()
            gc.collect()

    def items() -> Iterator[str]:
        yield "one"
        abandoned.wait(WAIT_S)
        yield "two"

    with Client(tiny_server.address) as client:
        threading.setprofile(collect)
        try:
            stream = client.embed_stream(items(), pooling="mean")
            assert next(stream).index == 0
        finally:
            threading.setprofile(None)
        into_garbage(stream)
        del stream
        abandoned.set()
        assert collected.wait(WAIT_S)
        poll(lambda: all(one.name != "layertap-stream" for one in threading.enumerate()), timeout_s=WAIT_S)


def test_calls_may_be_collected_in_the_middle_of_another_call(tiny_server: Server, no_collection: None) -> None:
    client = Client(tiny_server.address)
    abandoned = [client.embed_layers("x") for _ in range(30)]
    assert all(next(parts).layer == 0 for parts in abandoned)

    def collect(frame: FrameType, event: str, _: object) -> None:
        if event == "c_call" and frame.f_code.co_filename.endswith("transport.py") and abandoned:
            into_garbage(abandoned.pop())
            gc.collect()

    def work() -> None:
        sys.setprofile(collect)
        try:
            client.embed("x", pooling="mean")
        finally:
            sys.setprofile(None)

    assert done_in_time(work)
    assert len(abandoned) < 30
    client.close()


def test_a_question_on_a_channel_that_was_closed_meanwhile_says_so() -> None:
    async def ask(channel: grpc.aio.Channel | DuplexChannel) -> None:
        settings = StreamSettings(item_timeout_s=WAIT_S, reconnect_timeout_s=WAIT_S)
        endpoint = Endpoint(channel=channel, begin=asyncio.sleep)  # type: ignore[arg-type]
        progress = StreamProgress(StreamState(pb.EmbedOptions(), ordered=True))
        calls = StreamCalls(endpoint, server=resolve("127.0.0.1:1"), settings=settings, progress=progress)
        with pytest.raises(CancelledError, match="closed during the call"):
            await calls._refusal(UnavailableError("it fails"))

    async def main() -> None:
        closed = grpc.insecure_channel("127.0.0.1:1")
        closed.close()
        await ask(DuplexChannel(closed))
        awaited = grpc.aio.insecure_channel("127.0.0.1:1")
        await awaited.close()
        await ask(awaited)

    asyncio.run(main())


class Busy(grpc.GenericRpcHandler):
    """A server that answers nothing."""

    def __init__(self) -> None:
        self.ends = threading.Event()
        self.call_count = 0

    def service(self, _: object) -> Any:
        def wait(*_: object) -> bytes:
            self.call_count += 1
            self.ends.wait(WAIT_S)
            return b""

        return grpc.unary_unary_rpc_method_handler(wait)


@pytest.fixture
def busy() -> Iterator[tuple[Busy, str]]:
    handler = Busy()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        server = grpc.server(pool, handlers=(handler,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield handler, f"127.0.0.1:{port}"
        finally:
            handler.ends.set()
            server.stop(None).wait(WAIT_S)


def test_a_call_that_opens_further_connections_keeps_its_deadline(busy: tuple[Busy, str]) -> None:
    handler, address = busy
    client = Client(address, retries=0)
    with concurrent.futures.ThreadPoolExecutor(BUSY_CALL_COUNT) as pool:
        for _ in range(BUSY_CALL_COUNT):
            pool.submit(client.decode, [1])
        poll(lambda: handler.call_count == BUSY_CALL_COUNT)
        began = time.monotonic()
        with pytest.raises(DeadlineExceededError):
            client.decode([1], timeout_s=0.5)
        assert time.monotonic() - began < 5
        client.close()


def test_an_asyncio_call_that_opens_further_connections_keeps_its_deadline(busy: tuple[Busy, str]) -> None:
    handler, address = busy

    async def main() -> float:
        async with AsyncClient(address, retries=0) as client:
            calls = [asyncio.create_task(client.decode([1])) for _ in range(BUSY_CALL_COUNT)]
            while handler.call_count < BUSY_CALL_COUNT:
                await asyncio.sleep(0.01)
            began = time.monotonic()
            with pytest.raises(DeadlineExceededError):
                await client.decode([1], timeout_s=0.5)
            took_s = time.monotonic() - began
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            return took_s

    assert asyncio.run(main()) < 5


def test_a_question_that_is_left_keeps_no_thread(busy: tuple[Busy, str]) -> None:
    handler, address = busy
    channel = grpc.insecure_channel(address)

    async def main() -> None:
        ask = DuplexChannel(channel).unary_unary("/layertap.v1.EmbeddingService/GetModelInfo")
        asking = asyncio.create_task(ask(b"", timeout=2 * WAIT_S))
        while not handler.call_count:
            await asyncio.sleep(0.01)
        asking.cancel()

    assert done_in_time(lambda: asyncio.run(main())), "at its end a loop waits for its threads, as an interpreter does"
    channel.close()
