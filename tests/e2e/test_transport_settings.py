"""How a client connects: arguments and environment, several servers, retries, channels of the user's, ends."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import copy
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
from support import Server, open_client

from layertap import (
    TLS,
    AsyncClient,
    CancelledError,
    Client,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    LayertapError,
    ResourceExhaustedError,
    UnavailableError,
)
from layertap.v1 import embedding_pb2 as pb

WAIT_S = 30.0
PUSHBACK = "grpc-retry-pushback-ms"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TARGET", "TOKEN", "TLS_CA", "TLS_CERT", "TLS_KEY", "TIMEOUT_S"):
        monkeypatch.delenv(f"LAYERTAP_{name}", raising=False)


@pytest.mark.parametrize(
    ("tls", "words"),
    [(TLS(ca="/no/such/file"), ["tls.ca", "cannot be read"]), (TLS(ca=b"garbage"), ["tls.ca", "-----BEGIN"])],
)
def test_files_of_tls_are_read_at_the_first_call(kind: str, tls: TLS, words: list[str]) -> None:
    client = open_client(kind, "127.0.0.1:1", tls=tls)
    with pytest.raises(InvalidArgumentError) as caught:
        client.model_info()
    assert all(word in caught.value.details for word in words)
    client.close()


# A stand-in for a server, whose every answer the test decides.


class StandIn:
    """Answers Decode with its name, after the refusals that the test asks for; notes when it was called."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.refusals: list[tuple[grpc.StatusCode, str | None]] = []
        self.called_at: list[float] = []
        self.entered = threading.Event()
        self.hold = threading.Event()
        self.hold.set()

    def answer(self, request: bytes, context: Any) -> bytes:
        self.called_at.append(time.monotonic())
        self.entered.set()
        self.hold.wait(WAIT_S)
        if self.refusals:
            code, pushback = self.refusals.pop(0)
            context.set_trailing_metadata(((PUSHBACK, pushback),) if pushback else ())
            context.abort(code, "refused by the test")
        return pb.DecodeResponse(texts=[self.name]).SerializeToString()


@contextlib.contextmanager
def standing_in(*names: str) -> Iterator[list[tuple[StandIn, str]]]:
    with contextlib.ExitStack() as stack:
        found = []
        for name in names:
            one = StandIn(name)
            pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(2))
            server = grpc.server(pool)
            method = grpc.unary_unary_rpc_method_handler(one.answer)
            rpcs = {"Decode": method, "GetModelInfo": method}
            server.add_generic_rpc_handlers(
                (grpc.method_handlers_generic_handler("layertap.v1.EmbeddingService", rpcs),)
            )
            port = server.add_insecure_port("127.0.0.1:0")
            server.start()
            stack.callback(lambda server=server: server.stop(None).wait(WAIT_S))
            stack.callback(one.hold.set)
            found.append((one, f"127.0.0.1:{port}"))
        yield found


FULL, GONE = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE


def test_calls_are_repeated_when_the_server_wishes(kind: str) -> None:
    with standing_in("one") as [(server, address)]:
        client = open_client(kind, address)
        server.refusals = [(FULL, "300"), (GONE, "300")]
        assert client.decode([1]) == ["one"]
        first, second, third = server.called_at
        assert second - first >= 0.3 and third - second >= 0.3
        client.close()


@pytest.mark.parametrize(
    ("retries", "refusal", "calls"),
    [
        (3, (FULL, "-1"), 1),
        (3, (grpc.StatusCode.INVALID_ARGUMENT, None), 1),
        (3, (grpc.StatusCode.INTERNAL, None), 1),
        (3, (FULL, "1"), 4),
        (1, (GONE, None), 2),
        (1, (grpc.StatusCode.CANCELLED, None), 2),
        (0, (FULL, "1"), 1),
    ],
)
def test_calls_are_repeated_no_oftener_than_asked(
    kind: str, retries: int, refusal: tuple[grpc.StatusCode, str | None], calls: int
) -> None:
    with standing_in("one") as [(server, address)]:
        client = open_client(kind, address, retries=retries)
        server.refusals = [refusal] * 10
        with pytest.raises(LayertapError) as caught:
            client.decode([1])
        code = GONE if refusal[0] is grpc.StatusCode.CANCELLED else refusal[0]
        assert caught.value.code == code.value[0] and len(server.called_at) == calls
        client.close()


def test_a_large_request_is_repeated_too(kind: str) -> None:
    with standing_in("one") as [(server, address)]:
        client = open_client(kind, address)
        server.refusals = [(FULL, "1")]
        assert client.decode(list(range(1000)) * 500) == ["one"] and len(server.called_at) == 2
        client.close()


def test_several_servers_are_used_round_robin(kind: str) -> None:
    with standing_in("one", "two") as [(_, one), (_, two)]:
        client = open_client(kind, f"{one},{two}")
        client.wait_until_ready(timeout_s=WAIT_S)
        # The second may connect a moment after the first.
        found = itertools.takewhile(lambda names: len(names) < 2, _growing(client))
        assert all(names <= {"one", "two"} for names in found)
        client.close()


def _growing(client: Any) -> Iterator[set[str]]:
    names: set[str] = set()
    deadline = time.monotonic() + WAIT_S
    while True:
        assert time.monotonic() < deadline, "only one of them is asked"
        names |= set(client.decode([1]))
        yield names


def test_a_name_that_is_looked_up_is_a_target(kind: str) -> None:
    with standing_in("one") as [(_, address)]:
        client = open_client(kind, f"dns:///localhost:{address.rpartition(':')[2]}")
        assert client.decode([1]) == ["one"]
        client.close()


def test_options_reach_grpc(kind: str) -> None:
    with standing_in("one") as [(server, address)]:
        client = open_client(kind, address, options=[("grpc.service_config", "{}")])
        server.refusals = [(FULL, "1")]
        with pytest.raises(ResourceExhaustedError):
            client.decode([1])
        client.close()


def test_the_clients_deadline_is_that_of_its_calls(kind: str) -> None:
    with standing_in("one") as [(server, address)]:
        server.hold.clear()
        client = open_client(kind, address, timeout_s=0.2)
        with pytest.raises(DeadlineExceededError, match=r"within 0\.2 s"):
            client.decode([1])
        client.close()


def test_waiting_until_ready(kind: str) -> None:
    with standing_in("one") as [(server, address)]:
        client = open_client(kind, address, retries=0)
        server.refusals = [(GONE, None), (FULL, "1"), (GONE, "10")]
        assert client.wait_until_ready(timeout_s=WAIT_S) is None
        assert len(server.called_at) == 4
        server.refusals = [(grpc.StatusCode.UNAUTHENTICATED, "-1")]
        with pytest.raises(LayertapError, match="token="):
            client.wait_until_ready(timeout_s=WAIT_S)
        client.close()
    client = open_client(kind, address, retries=0)
    with pytest.raises(DeadlineExceededError, match=r"not ready within 0\.3 s.*no server answers"):
        client.wait_until_ready(timeout_s=0.3)
    client.close()


# Channels of the user's.


def test_a_given_channel_is_used_and_left_open(tiny_server: Server) -> None:
    with grpc.insecure_channel(tiny_server.address) as channel:
        with Client.from_channel(channel) as client:
            assert client.embed("I love Paris").layers == (3,)
            assert [result.index for result in client.embed_stream(["x"] * 600, pooling="mean")] == list(range(600))
            with pytest.raises(TypeError, match="from_channel"):
                copy.copy(client)
        with pytest.raises(FailedPreconditionError, match="closed"):
            client.model_info()
        assert Client.from_channel(channel).model_info().layer_count == 3


def test_a_given_asyncio_channel_is_used_and_left_open(tiny_server: Server) -> None:
    async def main() -> None:
        async with grpc.aio.insecure_channel(tiny_server.address) as channel:
            async with AsyncClient.from_channel(channel) as client:
                assert (await client.embed("I love Paris")).layers == (3,)
                assert [result.index async for result in client.embed_stream(["x", "y"])] == [0, 1]
            assert (await AsyncClient.from_channel(channel).model_info()).layer_count == 3

    asyncio.run(main())


def test_a_channel_of_another_kind_is_refused_at_once(tiny_server: Server) -> None:
    async def main() -> None:
        async with grpc.aio.insecure_channel(tiny_server.address) as channel:
            with pytest.raises(InvalidArgumentError, match="; Client needs a grpc"):
                Client.from_channel(channel)  # type: ignore[arg-type]

    asyncio.run(main())
    with grpc.insecure_channel(tiny_server.address) as channel:
        with pytest.raises(InvalidArgumentError, match="; AsyncClient needs a grpc"):
            AsyncClient.from_channel(channel)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgumentError, match="timeout_s is -1"):
            Client.from_channel(channel, timeout_s=-1)


# Ends.


def test_a_client_without_an_event_loop_works_inside_one(tiny_server: Server) -> None:
    async def cell() -> int:
        with Client(tiny_server.address) as client:
            client.embed("I love Paris")
            return len(list(client.embed_stream(["one", "two"], pooling="mean")))

    assert asyncio.run(cell()) == 2


def test_closing_ends_the_streams_of_other_threads(tiny_server: Server) -> None:
    client = Client(tiny_server.address)
    more = threading.Event()

    def items() -> Iterator[str]:
        yield "one"
        more.wait(WAIT_S)

    between = client.embed_stream(itertools.repeat("x"), pooling="mean")
    assert next(between).index == 0
    inside = client.embed_stream(items(), pooling="mean")
    assert next(inside).index == 0
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, inside)
        client.close()
        with pytest.raises(CancelledError, match="closed during the call"):
            waiting.result(WAIT_S)
        more.set()
    with pytest.raises(CancelledError, match="closed during the call"):
        list(between)
    assert not [one for one in threading.enumerate() if one.name == "layertap-stream"]


def test_closing_ends_the_calls_of_other_threads() -> None:
    with standing_in("one") as [(server, address)]:
        server.hold.clear()
        client = Client(address)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(client.decode, [1])
            assert server.entered.wait(WAIT_S)
            client.close()
            client.close()
            with pytest.raises(CancelledError, match="closed during the call"):
                waiting.result(WAIT_S)


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)


def test_an_interpreter_ends_with_whatever_is_under_way(tiny_server: Server) -> None:
    done = run(
        """
import itertools, sys, threading
import layertap
client = layertap.Client(sys.argv[1])
stream = client.embed_stream(itertools.repeat("x"), pooling="mean")
layers = client.embed_layers(["paris " * 500] * 50)
print(next(stream).index, next(layers).layer)
thread = threading.Thread(target=lambda: list(layertap.Client(sys.argv[1]).embed_stream(itertools.repeat("y"))))
thread.daemon = True
thread.start()
""",
        tiny_server.address,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["0", "0"]), done.stderr


# Forks.

FORKS = """
import asyncio, multiprocessing, os, sys
{before}
import layertap
address = sys.argv[1]
client = layertap.Client(address)

async def use():
    async with layertap.AsyncClient(address) as other:
        return (await other.embed("I love Paris", pooling="mean")).pooled.shape

def work(text):
    assert len(list(client.embed_stream([text, text], pooling="mean"))) == 2
    return client.embed(text, pooling="mean").pooled.shape

def forked(check):
    child = os.fork()
    if not child:
        try:
            print(check(), flush=True)
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

if {used}:
    work("x"), asyncio.run(use())
forked(lambda: work("x"))
forked(lambda: asyncio.run(use()))
forked(lambda: forked(lambda: work("a grandchild")) or "its parent")
if {pool}:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(pool.map(work, ["a", "b", "c"]) == [(1, 32)] * 3)
print(work("x"))
"""


@pytest.mark.parametrize("used", [False, True])
def test_a_client_works_in_forked_children(tiny_server: Server, used: bool) -> None:
    done = run(FORKS.format(before="", used=used, pool=True), tiny_server.address)
    assert done.stdout.splitlines() == ["(1, 32)"] * 3 + ["its parent", "True", "(1, 32)"], (done.stdout, done.stderr)


def test_where_grpc_would_hang_in_a_child_the_client_says_so(tiny_server: Server) -> None:
    before = "import os; os.environ.pop('GRPC_ENABLE_FORK_SUPPORT', None); import grpc"
    done = run(FORKS.format(before=before, used=True, pool=False), tiny_server.address)
    *told, last = done.stdout.splitlines()
    assert last == "(1, 32)" and told.pop() == "its parent" and len(told) == 3, (done.stdout, done.stderr)
    for line in told:
        assert line.startswith("FailedPreconditionError") and "GRPC_ENABLE_FORK_SUPPORT=1" in line


def test_no_server_answers(kind: str) -> None:
    client = open_client(kind, "127.0.0.1:1", retries=1)
    with pytest.raises(UnavailableError, match="no server answers at 127"):
        client.model_info()
    client.close()
