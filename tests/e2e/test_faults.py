"""Engines that run out of memory, hang or die, callers who leave, servers that end: real processes, real sockets."""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support import Server, faulty, running, worst
from support.faulty import Demand
from support.oracle import Oracle

from layertap import Client, ResourceExhaustedError, StreamResult, UnavailableError
from layertap._protocol.inputs import to_messages
from layertap._protocol.options import embed_options
from layertap.v1 import embedding_pb2 as pb
from layertap.v1 import embedding_pb2_grpc
from layertap_server.engine import device
from layertap_server.engine.host_copy import HostCopy
from layertap_server.engine.output_groups import output_groups
from layertap_server.types import OutOfMemoryError, Output, OutputKind, Plan, Run, Text

SCRIPT = Path(faulty.__file__)
WAIT_S = 60.0
BOUND = 2e-5
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

GOOD = [101, 2293, 3000, 102]


def demanding(demand: Demand, length: int = 6) -> list[int]:
    return [101, int(demand), *([2293] * (length - 3)), 102]


def encoded(server: Server) -> int:
    """Returns how many batches its engine has begun."""
    return server.log.count(b"encoding ")


@contextlib.contextmanager
def stub_of(server: Server) -> Iterator[tuple[embedding_pb2_grpc.EmbeddingServiceStub, health_pb2_grpc.HealthStub]]:
    with grpc.insecure_channel(server.address) as channel:
        yield embedding_pb2_grpc.EmbeddingServiceStub(channel), health_pb2_grpc.HealthStub(channel)


@contextlib.contextmanager
def ending(server: Server) -> Iterator[Server]:
    """Kills a server that a failed test has left."""
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()


# Out of memory, numbers that are none.


@pytest.fixture(scope="module")
def faulty(tiny_folder: Path) -> Iterator[Server]:
    flags = (
        "--device",
        "cpu",
        "--instances",
        "1",
        "--model-id",
        str(tiny_folder),
        "--shared-memory-bytes",
        str(8 << 20),
    )
    with running(*flags, script=SCRIPT) as server:
        yield server


BATCH = [demanding(Demand.NO_MEMORY_TOGETHER, 100 + 30 * (n % 5)) if n % 3 else GOOD for n in range(10)]


@pytest.mark.parametrize("shared_memory", [False, True])
def test_a_batch_without_memory_is_halved_and_its_numbers_are_right(
    faulty: Server, tiny_oracle: Oracle, shared_memory: bool
) -> None:
    wanted = [tiny_oracle.run(item)[0] for item in BATCH]
    before = encoded(faulty)
    with Client(faulty.address, shared_memory=shared_memory) as client:
        found = client.embed(BATCH, layers="all")
        for layer in range(4):
            for rows, right in zip(found.ragged(layer), wanted, strict=True):
                assert worst(rows, right[layer]) <= BOUND
        parts = [part for part in client.embed_layers(BATCH)]
        assert {(text, part.layer) for part in parts for text in part.texts} == {
            (n, k) for n in range(10) for k in range(4)
        }
        for part in parts:
            for text, rows in zip(part.texts, part.rows, strict=True):
                assert worst(rows, wanted[text][part.layer]) <= BOUND
        for n, result in enumerate(client.embed_stream(BATCH, layers=[0, 2])):
            assert result.index == n and result.error is None
            assert all(worst(result.embedding.ragged(k)[0], wanted[n][k]) <= BOUND for k in (0, 2))
        assert (client.shared_memory.byte_count > 0) == shared_memory
    assert encoded(faulty) > before + 10, "what does not fit together was run in parts"


def test_a_text_without_memory_is_refused_by_name_and_its_neighbours_are_not(
    faulty: Server, tiny_oracle: Oracle
) -> None:
    wanted, _ = tiny_oracle.run(GOOD)
    with Client(faulty.address) as client:
        with pytest.raises(ResourceExhaustedError, match=r"inputs\[1\].* 6 tokens") as caught:
            client.embed([GOOD, demanding(Demand.NO_MEMORY), GOOD], layers="all")
        assert caught.value.retry_after_s is None
        with pytest.raises(ResourceExhaustedError, match=r"inputs\[2\]"):
            client.embed([GOOD, GOOD, demanding(Demand.NO_MEMORY)], pooling=["mean"], pooler_output=True, layers=[0])
        results = list(client.embed_stream([GOOD, demanding(Demand.NO_MEMORY), GOOD] * 5, layers="all"))
    assert [type(result.error) for result in results] == [type(None), ResourceExhaustedError, type(None)] * 5
    assert "item 4" in results[4].error.details
    for result in results:
        if result.error is None:
            assert worst(result.embedding.ragged(-1)[0], wanted[-1]) <= BOUND


def test_the_allocators_own_errors_are_out_of_memory_and_no_other_is() -> None:
    cpu = torch.device("cpu")
    too_much = 1 << 60
    for allocate in (lambda: torch.empty(too_much, dtype=torch.uint8), lambda: np.empty(too_much, np.uint8)):
        with pytest.raises(OutOfMemoryError), device.named_errors(cpu):
            allocate()
    with pytest.raises(OutOfMemoryError), device.named_errors(cpu):
        raise torch.OutOfMemoryError
    with pytest.raises(RuntimeError, match="shape"), device.named_errors(cpu):
        torch.zeros(2) @ torch.zeros(3, 3).view(9)[:4].view(1, 5)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_row_that_is_no_number_fails_its_own_text_and_names_the_layer(value: float) -> None:
    plan = Plan(outputs=(Output(kind=OutputKind.HIDDEN_STATES, layers=(7,), row_size=2),), dtype="float32")
    texts = [Text(np.zeros(count, np.int32)) for count in (1, 2, 1)]
    rows = torch.zeros(4, 2)
    rows[2, 1] = value
    host_copy = HostCopy(None)
    (output_group,) = output_groups([Run(plan=plan, texts=texts)])
    host_copy.take(rows, output_group, 7)
    (found,) = host_copy.rest()
    assert list(found.failures) == [1]
    assert found.failures[1].code.name == "INTERNAL" and "layer 7" in found.failures[1].details


# Instances that are lost.


@pytest.mark.one_process
@pytest.mark.parametrize("demand", [Demand.STUCK, Demand.DEVICE_LOST])
def test_lost_instances_fail_their_callers_and_the_last_one_ends_the_server(tiny_folder: Path, demand: Demand) -> None:
    flags = ("--device", "cpu", "--instances", "2", "--model-id", str(tiny_folder), "--instance-timeout-s", "1")
    with (
        ending(Server(*flags, script=SCRIPT)) as server,
        stub_of(server) as (_, health),
        Client(server.address) as client,
    ):
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert next(watch).status == SERVING
        with pytest.raises(UnavailableError, match="engine has failed"):
            client.embed([demanding(demand)], layers="all")
        for n in range(10):
            assert client.embed(f"text {n}", timeout_s=WAIT_S).layers == (3,), "the other instance goes on"
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S).status == SERVING
        with pytest.raises(UnavailableError):
            client.embed([demanding(demand)], layers="all")
        assert next(watch).status == NOT_SERVING
        assert server.process.wait(WAIT_S) == 1
        server.stop()
        assert b"2 instances" in server.log and b"0 of 2 are left" in server.log
        assert server.log.decode().splitlines()[-1].startswith("layertap-server: the engine has failed")


# Callers who leave, deadlines that pass, servers that end: on one slow instance, whose batches are counted.

EIGHT = "one of eight words it is"


def slow_flags(tiny_folder: Path) -> tuple[str, ...]:
    return ("--device", "cpu", "--instances", "1", "--model-id", str(tiny_folder), "--max-batch-tokens", "16")


@pytest.fixture(scope="module")
def slow(tiny_folder: Path) -> Iterator[Server]:
    """Two texts of eight tokens a batch, five batches a second."""
    with running(*slow_flags(tiny_folder), "--batch-s", "0.2", script=SCRIPT) as server:
        yield server


def request_for(count: int) -> pb.EmbedLayersRequest:
    options = embed_options(
        layers="all",
        pooler_output=False,
        pooling=None,
        dtype="float32",
        truncation="error",
        max_length=None,
        return_tokens=False,
    )
    return pb.EmbedLayersRequest(inputs=to_messages([EIGHT] * count), options=options)


@pytest.mark.parametrize("way", ["cancel", "disconnect", "deadline", "leave a stream"])
def test_work_for_a_caller_who_left_stops_within_one_batch(slow: Server, way: str) -> None:
    with Client(slow.address) as client:
        if way == "leave a stream":
            stream = client.embed_stream(EIGHT for _ in range(1000))
            assert next(stream).error is None
            stream.close()
        else:
            with stub_of(slow) as (stub, _):
                call = stub.EmbedLayers(request_for(200), timeout=1 if way == "deadline" else WAIT_S)
                assert next(call).WhichOneof("part") == "header"
                assert next(call).WhichOneof("part") == "frame"
                if way == "cancel":
                    call.cancel()
                elif way == "deadline":
                    with pytest.raises(grpc.RpcError):
                        list(call)
        client.embed("x")  # What runs has ended, or has seen that no caller waits.
        before = encoded(slow)
        client.embed("y")
        assert encoded(slow) == before + 1


def test_what_expires_in_the_queue_is_never_computed(slow: Server) -> None:
    with stub_of(slow) as (stub, _), Client(slow.address) as client:
        first = stub.EmbedLayers(request_for(4), timeout=WAIT_S)
        assert next(first).WhichOneof("part") == "header"
        before = encoded(slow)
        late = [stub.EmbedLayers(request_for(20), timeout=0.05) for _ in range(5)]
        for call in late:
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert len(list(first)) > 2
        client.embed("x")
        assert encoded(slow) <= before + 2 + 1, "the two batches of the first call, and the last one's"


def test_sigterm_under_load_fails_no_call_that_was_accepted(tiny_folder: Path) -> None:
    outcomes: queue.Queue[str] = queue.Queue()

    def call_again_and_again(stub: embedding_pb2_grpc.EmbeddingServiceStub, unary: bool) -> None:
        accepted = True
        while accepted:
            accepted = False
            try:
                if unary:
                    stub.Embed(unary_request, timeout=WAIT_S)
                    accepted = True
                else:
                    for message in stub.EmbedLayers(layers_request, timeout=WAIT_S):
                        accepted = accepted or message.WhichOneof("part") == "header"
                    assert message.WhichOneof("part") == "summary"
                outcomes.put("done")
            except grpc.RpcError as exc:
                outcomes.put(f"{'accepted' if accepted else 'refused'} {exc.code().name} {exc.details()}")
                return

    layers_request = request_for(3)
    unary_request = pb.EmbedRequest(
        inputs=layers_request.inputs, options=pb.EmbedOptions(outputs=[pb.Output(pooled_vectors=pb.PooledVectors())])
    )
    flags = (*slow_flags(tiny_folder), "--batch-s", "0.05", "--grace-s", str(WAIT_S))
    with ending(Server(*flags, script=SCRIPT)) as server, stub_of(server) as (stub, health):
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert next(watch).status == SERVING
        callers = [threading.Thread(target=call_again_and_again, args=(stub, n % 2 == 0)) for n in range(12)]
        for caller in callers:
            caller.start()
        for _ in callers:
            assert outcomes.get(timeout=WAIT_S) == "done"
        server.signal(signal.SIGTERM)
        assert next(watch).status == NOT_SERVING
        for caller in callers:
            caller.join(WAIT_S)
            assert not caller.is_alive()
        assert server.process.wait(WAIT_S) == 0, "an open Watch must not delay the stop"
        server.stop()
    found = [outcomes.get() for _ in range(outcomes.qsize())]
    ends = [outcome for outcome in found if outcome != "done"]
    # What comes while gRPC closes its port is cancelled by it; layertap's own clients take that for unavailable too.
    assert len(ends) == 12 and all(outcome.startswith(("refused UNAVAILABLE", "refused CANCELLED")) for outcome in ends)
    assert found.count("done") >= 6, "what was under way has finished"
    assert b"did not finish" not in server.log and b"Traceback" not in server.log, server.log.decode()


def test_a_stream_continues_at_the_next_server_when_its_own_stops(tiny_folder: Path) -> None:
    texts = [f"{EIGHT} {n}" for n in range(400)]
    flags = ("--device", "cpu", "--model-id", str(tiny_folder), "--grace-s", str(WAIT_S))
    port = "0"
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(ending(Server(*flags, script=SCRIPT)))
        with Client(server.address) as client:
            wanted = [result.embedding.last_hidden_state for result in client.embed_stream(texts)]
            port = server.address.rsplit(":", 1)[1]
            begun = threading.Event()

            def items() -> Iterator[str]:
                for n, text in enumerate(texts):
                    if n == 300:
                        assert begun.wait(WAIT_S), "there is always more to come"
                    yield text

            found: list[StreamResult] = []
            for result in client.embed_stream(items(), reconnect_timeout_s=WAIT_S):
                found.append(result)
                if len(found) == 10:
                    assert server.stop() == 0
                    assert b"did not finish" not in server.log, "the stream has ended by itself"
                    server = stack.enter_context(ending(Server(*flags, "--port", port, script=SCRIPT)))
                    begun.set()
            assert [result.index for result in found] == list(range(len(texts)))
            for result, rows in zip(found, wanted, strict=True):
                assert np.abs(result.embedding.last_hidden_state - rows).max() <= BOUND


def test_calls_that_outlast_the_grace_fail_and_a_second_signal_ends_all_at_once(tiny_folder: Path) -> None:
    flags = (*slow_flags(tiny_folder), "--batch-s", "0.2")
    with ending(Server(*flags, "--grace-s", "0.2", script=SCRIPT)) as server, stub_of(server) as (stub, _):
        calls = [stub.EmbedLayers(request_for(400), timeout=WAIT_S) for _ in range(3)]
        assert all(next(call).WhichOneof("part") == "header" for call in calls)
        server.signal(signal.SIGTERM)
        for call in calls:
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "could not finish in time" in caught.value.details()
        assert server.process.wait(WAIT_S) == 0
        server.stop()
        assert b"Traceback" not in server.log, server.log.decode()
    with ending(Server(*flags, script=SCRIPT)) as server, stub_of(server) as (stub, health):
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert next(watch).status == SERVING
        call = stub.EmbedLayers(request_for(400), timeout=WAIT_S)
        assert next(call).WhichOneof("part") == "header"
        server.signal(signal.SIGINT)
        assert next(watch).status == NOT_SERVING
        server.signal(signal.SIGINT)
        assert server.process.wait(WAIT_S) == 130
        server.stop()
