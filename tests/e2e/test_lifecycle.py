"""Servers that stop, die and come back, callers that stop reading or leave: no other notices, nothing is lost."""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support import ROOT, Server, forks, poll, running

from layertap import Client, FailedPreconditionError, ResourceExhaustedError, StreamResult, UnavailableError
from layertap._protocol.assembler import EmbedAssembler
from layertap._protocol.inputs import to_messages
from layertap._protocol.options import embed_options
from layertap.v1 import embedding_pb2 as pb
from layertap.v1 import embedding_pb2_grpc

WAIT_S = 30.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

LONG = "paris " * 510
"""512 tokens: 64 KiB a layer of the tiny model, 256 KiB all four."""

ALL_LAYERS = {
    "layers": "all",
    "pooler_output": False,
    "pooling": None,
    "dtype": "float32",
    "truncation": "error",
    "max_length": None,
    "return_tokens": False,
}


@contextlib.contextmanager
def stub_of(server: Server) -> Iterator[tuple[embedding_pb2_grpc.EmbeddingServiceStub, health_pb2_grpc.HealthStub]]:
    """Stock gRPC, with a small window, so that a reader who stops is felt at once."""
    with grpc.insecure_channel(server.address, options=[("grpc.http2.bdp_probe", 0)]) as channel:
        yield embedding_pb2_grpc.EmbeddingServiceStub(channel), health_pb2_grpc.HealthStub(channel)


def request_for(texts: list[str]) -> pb.EmbedLayersRequest:
    return pb.EmbedLayersRequest(inputs=to_messages(texts), options=embed_options(**ALL_LAYERS))


def assemble(request: pb.EmbedLayersRequest, messages: list[pb.EmbedLayersResponse]) -> Any:
    assembler = EmbedAssembler(list(request.inputs), request.options)
    for message in messages:
        assembler.feed(message, message.data)
    return assembler.finish()


def test_sigterm_lets_running_calls_finish_refuses_new_ones_and_exits_0(tiny_folder: Path) -> None:
    request = request_for([LONG] * 60)
    with running("--device", "cpu", "--model-id", str(tiny_folder)) as server, stub_of(server) as (stub, health):
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert next(watch).status == SERVING
        stream = stub.EmbedLayers(request, timeout=WAIT_S)
        messages = [next(stream)]  # 15 MiB are to come: the call is under way until we have read them.
        server.signal(signal.SIGTERM)
        assert next(watch).status == NOT_SERVING
        watch.cancel()
        with Client(server.address) as late, pytest.raises(UnavailableError):
            late.embed("too late", timeout_s=WAIT_S)
        messages.extend(stream)
        found = assemble(request, messages)
        assert found.last_hidden_state.shape == (60, 512, 32)
        rows = found.ragged(-1)
        assert all(np.abs(one - rows[0]).max() <= 2e-5 for one in rows) and np.abs(rows[0]).max() > 0.1
        assert server.process.wait(WAIT_S) == 0


def test_an_idle_server_stops_at_once_on_either_signal(tiny_folder: Path) -> None:
    server = Server("--device", "cpu", "--model-id", str(tiny_folder))
    with Client(server.address) as client:
        assert client.embed("x").layers == (3,)
        server.signal(signal.SIGINT)
        assert server.process.wait(10) == 0
    assert server.stop() == 0


class Unread(Server):
    """A server whose log is not read."""

    def _read_log(self) -> None:
        pass


def test_neither_an_unread_log_nor_a_silent_collector_delays_calls_or_the_end_after_a_hangup(tiny_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        flags = ("--device", "cpu", "--model-id", str(tiny_folder), "--log-level", "debug", "--traces", "otlp")
        server = Unread(*flags, environment=environment)
        try:
            fcntl.fcntl(server.process.stderr, fcntl.F_SETPIPE_SZ, 4096)
            with Client(server.address) as client, stub_of(server) as (stub, _):
                for n in range(100):
                    assert client.tokenize(f"text {n}", timeout_s=WAIT_S)
                stream = stub.EmbedLayers(request_for([LONG] * 60), timeout=WAIT_S)
                messages = [next(stream)]
                server.signal(signal.SIGHUP)
                messages.extend(stream)
                assert assemble(request_for([LONG] * 60), messages).last_hidden_state.shape == (60, 512, 32)
            assert server.process.wait(10) == 0
            server.stop()
        finally:
            ended(server)


@pytest.mark.parametrize(("flags", "code"), [((), 0), (("--fail",), 1)], ids=["stopped", "failed"])
def test_threads_that_hang_do_not_keep_the_process(flags: tuple[str, ...], code: int) -> None:
    server = Server(*flags, script=ROOT / "tests/support/hanging.py")
    try:
        assert server.process.wait(WAIT_S) == code
        server.stop()
        assert (b"it fails while it serves" in server.log) is bool(code)
    finally:
        ended(server)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_model_loads_ends_the_server(number: signal.Signals, tiny_folder: Path) -> None:
    arguments = ["-m", "layertap_server", "--port", "0", "--device", "cpu", "--model-id", str(tiny_folder)]
    process = forks.start(arguments, dict(os.environ))
    assert process is not None
    with process.stdout, process.stderr:
        assert any(b"found the model" in line for line in process.stderr)
        process.send_signal(number)
        assert process.wait(WAIT_S) == (0 if number == signal.SIGTERM else 130)
        assert b"Traceback" not in process.stderr.read() and not process.stdout.read()


@pytest.fixture(scope="module")
def tight_server(tiny_folder: Path) -> Iterator[Server]:
    """Its memory for outputs holds one longest text with all layers, and little more."""
    with running(
        *("--device", "cpu", "--model-id", str(tiny_folder), "--instances", "1", "--stall-timeout-s", "1"),
        *("--max-output-bytes", "300000", "--max-call-output-bytes", "300000"),
        *("--max-text-count", "100", "--max-queue-text-count", "100"),
    ) as server:
        yield server


@pytest.mark.one_process
def test_a_stalled_reader_harms_no_other_client_and_is_dropped(tight_server: Server) -> None:
    with stub_of(tight_server) as (stub, _), Client(tight_server.address) as client:
        stalled = stub.EmbedLayers(request_for([LONG] * 50), timeout=WAIT_S)
        assert next(stalled).WhichOneof("part") == "header"
        for n in range(10):
            found = client.embed(f"text {n}", pooling="mean", timeout_s=5)
            assert found.pooled.shape == (1, 32)
        # A whole long text finds room only when what the stalled call holds has been given back.
        assert client.embed(LONG, layers="all", timeout_s=WAIT_S).layers == (0, 1, 2, 3)
        with pytest.raises(grpc.RpcError) as caught:
            for _ in stalled:
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "not read for 1 s" in caught.value.details()


@pytest.mark.one_process
def test_a_cancelled_call_frees_the_queue(tight_server: Server) -> None:
    with stub_of(tight_server) as (stub, _), Client(tight_server.address, retries=0) as client:
        stalled = stub.EmbedLayers(request_for([LONG] * 100), timeout=WAIT_S)
        assert next(stalled).WhichOneof("part") == "header"
        with pytest.raises(ResourceExhaustedError) as caught:
            client.embed(["x"] * 100, pooling="mean")
        assert caught.value.retry_after_s is not None and caught.value.retry_after_s > 0
        stalled.cancel()

        def served() -> bool:
            try:
                return client.embed(["x"] * 100, pooling="mean", timeout_s=10).pooled.shape == (100, 32)
            except ResourceExhaustedError:
                return False

        poll(served)


@pytest.mark.one_process
def test_a_text_whose_outputs_can_never_fit_is_refused_and_does_not_wait_for_ever(tight_server: Server) -> None:
    options = embed_options(**ALL_LAYERS)
    options.outputs.append(options.outputs[0])
    request = pb.EmbedLayersRequest(inputs=to_messages([LONG]), options=options)
    with stub_of(tight_server) as (stub, _):
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.EmbedLayers(request, timeout=5))
        assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)


def test_health_answers_while_a_large_answer_streams(tiny_server: Server) -> None:
    request = request_for([LONG] * 60)
    with stub_of(tiny_server) as (stub, health):
        stream = stub.EmbedLayers(request, timeout=WAIT_S)
        messages = [next(stream)]
        for message in stream:
            messages.append(message)
            if len(messages) % 10 == 0:
                assert health.Check(health_pb2.HealthCheckRequest(), timeout=2).status == SERVING
        found = assemble(request, messages)
        assert len(messages) > 60 and found.token_counts.tolist() == [512] * 60


TEXTS = [f"text {n} " + "of many words " * (n % 40) for n in range(300)]


def check_stream(found: list[StreamResult], wanted: list[StreamResult]) -> None:
    assert [result.index for result in found] == list(range(len(wanted)))
    for one, other in zip(found, wanted, strict=True):
        assert one.error is None and other.error is None
        for layer in other.embedding.layers:
            assert np.abs(one.embedding.ragged(layer)[0] - other.embedding.ragged(layer)[0]).max() <= 2e-5


def ended(server: Server) -> None:
    """Kills a server that a failed test has left."""
    if server.process.poll() is None:
        server.kill()


def started(server: Server, *flags: str) -> Server:
    """Starts another server where one has been."""
    return Server(*flags, "--port", server.address.rsplit(":", 1)[1])


def test_a_stream_survives_a_killed_server_each_result_once_and_in_order(tiny_folder: Path) -> None:
    flags = ("--device", "cpu", "--model-id", str(tiny_folder))
    server = Server(*flags)
    back = threading.Event()

    def items() -> Iterator[str]:
        for n, text in enumerate(TEXTS):
            if n == 200:
                assert back.wait(WAIT_S)  # Some come only after the restart.
            yield text

    try:
        with Client(server.address) as client:
            wanted = list(client.embed_stream(TEXTS, layers="all"))
            check_stream(wanted, wanted)
            found = []
            for result in client.embed_stream(items(), layers="all"):
                found.append(result)
                if len(found) == 50:
                    server.kill()
                    server = started(server, *flags)
                    back.set()
            check_stream(found, wanted)
            assert server.stop() == 0 and b"Traceback" not in server.log
    finally:
        back.set()
        ended(server)


def test_a_stream_refuses_another_model_and_gives_up_when_no_server_returns(tiny_folder: Path) -> None:
    flags = ("--device", "cpu", "--model-id", str(tiny_folder))
    server = Server(*flags)
    again: queue.Queue[str] = queue.Queue()
    try:
        with Client(server.address) as client:
            stream = client.embed_stream(iter(again.get, "end"), pooling="mean")
            again.put("before")
            assert next(stream).embedding.pooled.shape == (1, 32)
            server.kill()
            server = started(server, *flags, "--load-format", "dummy", "--seed", "7")
            again.put("after")
            with pytest.raises(FailedPreconditionError, match="another model"):
                next(stream)
            again.put("end")
            server.kill()
            with pytest.raises(UnavailableError, match="no server answers"):
                list(client.embed_stream(["x"], reconnect_timeout_s=0.5))
    finally:
        again.put("end")
        ended(server)


@pytest.mark.one_process
def test_leaving_a_stream_ends_it_on_the_server_too(tight_server: Server) -> None:
    with Client(tight_server.address) as client:
        for _ in range(3):
            stream = client.embed_stream((LONG for _ in range(1000)), layers="all")
            assert next(stream).index == 0
            stream.close()
        # Nothing of what was left behind holds memory: one long text needs nearly all of it.
        assert client.embed(LONG, layers="all", timeout_s=WAIT_S).layers == (0, 1, 2, 3)
        names = {thread.name for thread in threading.enumerate()}
        assert "layertap-stream" not in names


def test_frames_are_as_small_as_asked(tiny_folder: Path) -> None:
    with running("--device", "cpu", "--model-id", str(tiny_folder), "--max-frame-bytes", "16384") as server:
        request = request_for([LONG, "short", LONG])
        with stub_of(server) as (stub, _):
            messages = list(stub.EmbedLayers(request, timeout=WAIT_S))
        assert max(message.ByteSize() for message in messages) <= 16384
        found = assemble(request, messages)
        with Client(server.address) as client:
            whole = client.embed([LONG, "short", LONG], layers="all")
            info = client.model_info()
        assert info.limits.max_frame_bytes == 16384
        for layer in whole.layers:
            assert np.abs(found.hidden_states[layer] - whole.hidden_states[layer]).max() <= 2e-5
