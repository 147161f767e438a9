"""What callers send counts before it is whole, silence keeps no places, and others are served meanwhile."""

from __future__ import annotations

import gzip
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support import Server, poll, running
from support.http2 import Connection
from support.memory import sums

from layertap import Client
from layertap.v1 import embedding_pb2 as pb
from layertap.v1 import embedding_pb2_grpc

TOKENIZE = "/layertap.v1.EmbeddingService/Tokenize"
EMBED = "/layertap.v1.EmbeddingService/Embed"
LAYERS = "/layertap.v1.EmbeddingService/EmbedLayers"
STREAM = "/layertap.v1.EmbeddingService/EmbedStream"
CALLS, REQUEST_BYTES = 32, 1 << 20
STALL_S, IDLE_S = 3.0, 4.0
MARGIN = 64 << 20
"""What a server may grow by besides: its allocator's own."""


FLAGS = {
    "max-concurrent-call-count": CALLS,
    "max-request-bytes": REQUEST_BYTES,
    "max-response-bytes": 1 << 20,
    "max-queue-bytes": REQUEST_BYTES,
    "max-output-bytes": 32 << 20,
    "max-call-output-bytes": 8 << 20,
    "max-connection-count": 20,
}


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[Server]:
    """A server with small limits. All tests together take no more memory than the page about limits says."""
    with running(
        *("--device", "cpu", "--model-id", str(tiny_folder), "--log-level", "error", "--instances", "2"),
        *(part for flag, value in FLAGS.items() for part in (f"--{flag}", str(value))),
        *("--stall-timeout-s", str(STALL_S), "--idle-timeout-s", str(IDLE_S)),
    ) as started:
        with Client(started.address) as client:
            client.embed("warm")
        at_rest = memory(started)
        yield started
        others = {"max-shared-memory-call-count": 16, "shared-memory-bytes": 0}
        most = sum(byte_count for byte_count, _ in sums(FLAGS | others))
        peak = int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{started.process.pid}/status").read_text())[1]) << 10
        assert peak < at_rest + most


def memory(server: Server) -> int:
    return int(psutil.Process(server.process.pid).memory_info().rss)


def options() -> pb.EmbedOptions:
    return pb.EmbedOptions(outputs=[pb.Output(pooled_vectors=pb.PooledVectors())])


def opening() -> bytes:
    return pb.EmbedStreamRequest(options=pb.StreamOptions(options=options())).SerializeToString()


def test_requests_that_are_not_whole_are_bounded_make_place_and_end_in_time(server: Server) -> None:
    before = memory(server)
    with Connection(server.address) as hostile, Client(server.address) as client:
        for _ in range(4 * CALLS - 8):
            hostile.open(EMBED, bytes(REQUEST_BYTES - 1), byte_count=REQUEST_BYTES)
        hostile.pump(2.0)
        for n in range(5):
            started = time.monotonic()
            assert len(client.embed(f"short {n}", timeout_s=10)) > 0
            assert time.monotonic() - started < 2.0
        hostile.pump(1.0)
        assert memory(server) - before < CALLS * REQUEST_BYTES + MARGIN
        assert hostile.initial_window <= 65_535
        hostile.wait(4 * STALL_S, count=4 * CALLS - 8)
        assert len(hostile.ended) == 4 * CALLS - 8, "what never becomes whole ends by itself"


@pytest.mark.parametrize(
    "method", ["/grpc.health.v1.Health/Check", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"]
)
def test_requests_outside_of_admission_are_bounded_too(server: Server, method: str) -> None:
    before = memory(server)
    with Connection(server.address) as hostile, grpc.insecure_channel(server.address) as channel:
        for _ in range(90):
            hostile.open(method, bytes(REQUEST_BYTES - 1), byte_count=REQUEST_BYTES)
        hostile.pump(2.0)
        hostile.wait(5.0, count=60)
        assert len(hostile.ended) >= 60
        assert memory(server) - before < MARGIN
        for _ in range(5):
            request = health_pb2.HealthCheckRequest()
            assert health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status


def test_answers_of_one_message_that_are_not_read_give_their_places_back(server: Server) -> None:
    texts = [pb.Input(text="paris " * 300)] * 40
    request = pb.TokenizeRequest(inputs=texts).SerializeToString()
    with Connection(server.address) as hostile:
        for _ in range(20):
            hostile.open(TOKENIZE, request)
        hostile.wait(4 * STALL_S, count=20)
        assert len(hostile.ended) == 20


def test_what_a_call_does_not_read_stays_with_its_caller(server: Server) -> None:
    layers = pb.EmbedOptions(outputs=[pb.Output(hidden_states=pb.HiddenStates(all_layers=True))])
    request = pb.EmbedLayersRequest(inputs=[pb.Input(text="paris " * 500)], options=layers).SerializeToString()
    before = memory(server)
    with Connection(server.address) as hostile:
        for _ in range(20):  # Their answers are not read, and they have sent all that the server reads.
            hostile.open(LAYERS, request, bytes(8 << 20))
        hostile.pump(2.0)
        assert hostile.initial_window <= 65_535 and not hostile.sent_all
        assert memory(server) - before < MARGIN


def test_attentions_count_by_pairs_of_tokens_before_they_are_computed(server: Server) -> None:
    every = pb.EmbedOptions(outputs=[pb.Output(attentions=pb.Attentions(all_layers=True))])
    before = memory(server)
    with (
        grpc.insecure_channel(server.address) as channel,
        pytest.raises(grpc.RpcError, match="12000000 bytes") as caught,
    ):
        # 3 layers and 4 heads of 500 * 500 values: more than one call may have.
        request = pb.EmbedLayersRequest(inputs=[pb.Input(text="paris " * 498)], options=every)
        list(embedding_pb2_grpc.EmbeddingServiceStub(channel).EmbedLayers(request, timeout=60))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    request = pb.EmbedLayersRequest(inputs=[pb.Input(text="paris " * 348)] * 20, options=every)  # 6 MB each.
    with Connection(server.address, host="127.0.0.2") as hostile, Client(server.address) as client:
        for _ in range(20):
            hostile.open(LAYERS, request.SerializeToString())
        hostile.pump(1.0)
        hostile.wait(1.0, count=20)
        assert len(client.embed("short", timeout_s=10)) == 1
        assert memory(server) - before < FLAGS["max-output-bytes"] + MARGIN, "without the bound it were 2.3 GB"


def test_a_message_counts_by_what_it_is_decompressed_to(server: Server) -> None:
    before = memory(server)
    bomb = gzip.compress(bytes(256 << 20))
    with Connection(server.address) as hostile:
        for _ in range(8):
            hostile.open(EMBED, bomb, compressed=True)
        hostile.pump(5.0)
        hostile.wait(10.0, count=8)
        assert len(hostile.ended) == 8
        assert all(b"grpc-status\x018" in head for head in hostile.ended.values()), "RESOURCE_EXHAUSTED"
    assert memory(server) - before < 8 * REQUEST_BYTES + MARGIN


def test_idle_streams_of_many_addresses_make_place_for_others(server: Server) -> None:
    with ExitStack() as stack:
        hostile = [stack.enter_context(Connection(server.address, host=f"127.0.0.{n}")) for n in range(2, 11)]
        for connection in hostile:
            for _ in range(CALLS // 8):
                connection.open(STREAM, opening())
            connection.pump(1.0)
        with Client(server.address) as client:
            poll(lambda: sum(len(one.ended) for one in hostile) or len(client.embed("a")) > 0)
            for n in range(10):
                started = time.monotonic()
                assert len(client.embed(f"short {n}", timeout_s=10)) > 0
                assert time.monotonic() - started < 2.0


def test_unread_streams_leave_the_last_quarter_of_the_queue_to_others(server: Server) -> None:
    texts = pb.StreamInputs(inputs=[pb.StreamInput(id=n, input=pb.Input(text="a")) for n in range(5000)])
    message = pb.EmbedStreamRequest(inputs=texts).SerializeToString()
    with Connection(server.address, host="127.0.0.2") as hostile, Client(server.address) as client:
        for _ in range(12):
            hostile.open(STREAM, opening(), message)
        hostile.pump(1.5)
        hostile.wait(1.0, count=12)  # Enough is read and computed that each has more answers than it takes.
        for n in range(20):
            assert len(client.embed([f"short {n}"] * 20, timeout_s=10)) == 20


def test_large_messages_of_streams_count_and_all_are_answered(server: Server) -> None:
    """Each is as large as the memory for all requests; they come one after the other."""
    texts = ["x" * 1500] * 600
    before = memory(server)

    def embedded() -> list[int]:
        with grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
            inputs = [pb.StreamInput(id=n, input=pb.Input(text=one)) for n, one in enumerate(texts)]
            messages = [
                pb.EmbedStreamRequest.FromString(opening()),
                pb.EmbedStreamRequest(inputs=pb.StreamInputs(inputs=inputs)),
            ]
            return [one for answer in stub.EmbedStream(iter(messages), timeout=60) for one in answer.results.ids]

    with ThreadPoolExecutor(6) as executor:
        answers = [one.result() for one in [executor.submit(embedded) for _ in range(6)]]
    assert all(sorted(found) == list(range(len(texts))) for found in answers)
    assert memory(server) - before < 2 * MARGIN


def test_a_stream_ends_after_it_was_idle_for_its_time_and_no_sooner(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        asked = pb.EmbedStreamRequest.FromString(opening())
        last = pb.EmbedStreamRequest()
        last.inputs.inputs.append(pb.StreamInput(id=1, input=pb.Input(text="paris")))
        ended = []

        def requests() -> Iterator[pb.EmbedStreamRequest]:
            yield asked
            yield last
            poll(lambda: bool(ended))

        started = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            try:
                answers = list(stub.EmbedStream(requests(), timeout=60))
                assert answers
            finally:
                ended.append(True)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE and "idle" in caught.value.details()
        assert time.monotonic() - started >= IDLE_S


def test_connections_above_their_number_are_closed(server: Server) -> None:
    with ExitStack() as stack, Client(server.address) as client:
        client.embed("a")
        for _ in range(19):  # The client has the twentieth.
            stack.enter_context(Connection(server.address))
        with Connection(server.address) as another:
            poll(lambda: another.pump(0.1) or another.closed)
        assert len(client.embed("still served")) > 0
