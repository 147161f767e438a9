"""The Open Inference Protocol over bare gRPC: what its clients do not send, and what it shares with the contract."""

from __future__ import annotations

import queue
import re
import signal
import struct
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from support import Server, poll, running

from layertap import Client
from layertap_server.compat import open_inference_pb2 as kserve

SERVICE = "inference.GRPCInferenceService"
TOKEN = "a-token-of-a-test"
METADATA = (("authorization", f"Bearer {TOKEN}"),)
TIMEOUT_S = 60.0


class Stub:
    """The RPCs of the service on one channel."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)

    def __enter__(self) -> Stub:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def unary(self, name: str, request: Any, metadata: Any = METADATA) -> Any:
        answer = getattr(kserve, f"{name}Response")
        method = self._channel.unary_unary(
            f"/{SERVICE}/{name}",
            request_serializer=lambda message: message if isinstance(message, bytes) else message.SerializeToString(),
            response_deserializer=answer.FromString,
        )
        return method(request, timeout=TIMEOUT_S, metadata=metadata)

    def stream(self, requests: Iterator[kserve.ModelInferRequest]) -> Any:
        method = self._channel.stream_stream(
            f"/{SERVICE}/ModelStreamInfer",
            request_serializer=kserve.ModelInferRequest.SerializeToString,
            response_deserializer=kserve.ModelStreamInferResponse.FromString,
        )
        return method(requests, timeout=TIMEOUT_S, metadata=METADATA)


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text(f"tester {TOKEN}\n")
    tokens.chmod(0o600)
    flags = ("--kserve", "--model-name", "tiny", "--token-file", str(tokens), "--metrics-port", "0")
    with running("--device", "cpu", "--model-id", str(tiny_folder), *flags) as server:
        yield server


@pytest.fixture(scope="module")
def stub(server: Server) -> Iterator[Stub]:
    with Stub(server.address) as stub:
        yield stub


def request(*texts: str | bytes, output: str = "mean", **fields: Any) -> kserve.ModelInferRequest:
    """A request whose texts are in the list of contents."""
    message = kserve.ModelInferRequest(model_name="tiny", **fields)
    tensor = message.inputs.add(name="text", datatype="BYTES", shape=[len(texts)])
    tensor.contents.bytes_contents.extend(text.encode() if isinstance(text, str) else text for text in texts)
    message.outputs.add(name=output)
    return message


def vectors(answer: kserve.ModelInferResponse) -> np.ndarray:
    ((output,), (raw,)) = answer.outputs, answer.raw_output_contents
    assert output.datatype == "FP32"
    return np.frombuffer(raw, "<f4").reshape(tuple(output.shape))


def refused(stub: Stub, message: Any, code: grpc.StatusCode, words: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.unary("ModelInfer", message)
    assert caught.value.code() is code and words in caught.value.details()
    assert stub.unary("ModelInfer", request("a")).outputs[0].shape == [1, 32]


def test_values_may_come_as_lists_of_contents(stub: Stub, server: Server) -> None:
    with Client(server.address, token=TOKEN) as client:
        expected = client.embed(["I love Paris", ""], pooling="mean").pooled
        assert np.array_equal(vectors(stub.unary("ModelInfer", request("I love Paris", ""))), expected)
        ids = [[101, 7592, 102], [101, 3000, 102]]
        expected = client.embed({"input_ids": ids}, pooling="mean").pooled
    for datatype, contents in (("INT64", "int64_contents"), ("INT32", "int_contents")):
        message = request("")
        del message.inputs[:]
        tensor = message.inputs.add(name="input_ids", datatype=datatype, shape=[2, 3])
        getattr(tensor.contents, contents).extend(np.ravel(ids).tolist())
        assert np.array_equal(vectors(stub.unary("ModelInfer", message)), expected)


def raw(value: bytes, shape: list[int], datatype: str = "BYTES", name: str = "text") -> kserve.ModelInferRequest:
    message = request("")
    del message.inputs[:]
    message.inputs.add(name=name, datatype=datatype, shape=shape)
    message.raw_input_contents.append(value)
    return message


def change(message: kserve.ModelInferRequest, alter: Callable[[Any], object]) -> kserve.ModelInferRequest:
    alter(message)
    return message


LONG = struct.pack("<I", 1 << 31)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (b"\xff\xff\xff", "the request is no ModelInferRequest"),
        (raw(b"\x01\x00", [1]), "text[0] is cut"),
        (raw(LONG + b"a", [1]), "text[0] is cut"),
        (raw(b"\x00\x00\x00\x00" * 5, [2]), "a shape of 2 values"),
        (raw(b"", [1]), "a shape of 1 values"),
        (raw(b"", []), "text has no texts"),
        (raw(b"", [-1]), "text has no texts"),
        (raw(b"", [1 << 62, 1]), "the most is 1000"),
        (raw(b"\x00" * 15, [1, 2], "INT64", "input_ids"), "a shape of 2 values"),
        (raw(b"\x00" * 15, [1, 1], "INT64", "input_ids"), "a shape of 1 values"),
        (raw(b"", [1, -1], "INT64", "input_ids"), "of shape [text_count, length]"),
        (raw(b"", [1, 1 << 62], "INT64", "input_ids"), "other than so many have come"),
        (change(request("a"), lambda m: m.raw_input_contents.extend([b"", b""])), "2 entries for 1 input;"),
        (change(request("a"), lambda m: m.inputs[0].shape.__setitem__(0, 2)), "a shape of 2 values"),
        (change(request("a"), lambda m: m.inputs.extend(m.inputs[:] * 9)), "inputs has 10 tensors"),
        (change(request("a"), lambda m: m.inputs.extend(m.inputs[:])), "each at most once"),
        (change(request("a"), lambda m: m.inputs[0].parameters["x"].SetInParent()), "text has parameters"),
        (change(request("a"), lambda m: m.inputs.pop()), "either text alone"),
        (change(request("a"), lambda m: m.outputs.extend(m.outputs[:] * 200)), "outputs has 201 entries"),
        (change(request("a"), lambda m: m.parameters["dtype"].SetInParent()), "parameters.dtype must be one of"),
        (request("a", b"\xc3"), "text[1] is not UTF-8 from byte 0 on"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_client_sends_is_refused_and_harms_nothing(stub: Stub, message: Any, words: str) -> None:
    refused(stub, message, grpc.StatusCode.INVALID_ARGUMENT, words)


def test_as_many_texts_as_one_request_may_have_fit_into_one(stub: Stub) -> None:
    text = "I love Paris " * 40
    length = struct.pack("<I", len(text))
    message = raw((length + text.encode()) * 1000, [1000])
    message.parameters["truncation"].string_param = "right"
    assert message.ByteSize() > 500_000 and vectors(stub.unary("ModelInfer", message)).shape == (1000, 32)


def test_values_of_a_large_request_that_stand_in_lists_are_refused_with_the_way_to_send_them(stub: Stub) -> None:
    message = request(*["x" * 1000] * 300)
    refused(stub, message, grpc.StatusCode.INVALID_ARGUMENT, "the most is 262144; send them in raw_input_contents")


def test_a_message_above_the_limit_is_refused(stub: Stub) -> None:
    refused(stub, request("x" * (80 << 20)), grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max")


def test_calls_need_a_token_and_are_logged_and_counted(stub: Stub, server: Server) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.unary("ModelInfer", request("a"), metadata=())
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    stub.unary("ModelInfer", request("one", "two"), metadata=(*METADATA, ("x-request-id", "a-test")))
    line = re.compile(rb"request_id=a-test method=ModelInfer code=OK client=tester .* text_count=2")
    poll(lambda: line.search(server.log) is not None)
    url = server.process.stdout.readline().decode().split()[-1]  # type: ignore[union-attr]
    text = urllib.request.urlopen(url, timeout=TIMEOUT_S).read().decode()
    assert float(re.search(r'request_handled_total\{code="OK",method="ModelInfer"\} ([\d.]+)', text)[1]) >= 1
    for method in ("ServerMetadata", "ModelMetadata", "ModelStreamInfer"):
        assert f'method="{method}"' in text


def test_health_and_reflection_know_the_service(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        check = health_pb2.HealthCheckRequest(service=SERVICE)
        assert health_pb2_grpc.HealthStub(channel).Check(check, timeout=TIMEOUT_S).status == 1
        with_token = grpc.intercept_channel(channel, _Token())
        assert SERVICE in ProtoReflectionDescriptorDatabase(with_token).get_services()


class _Token(grpc.StreamStreamClientInterceptor):
    """Adds the token to reflection's calls."""

    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        return continuation(details._replace(metadata=METADATA), requests)


def test_a_request_that_cannot_be_read_is_not_a_model_that_is_ready(stub: Stub) -> None:
    assert not stub.unary("ModelReady", b"\xff\xff").ready


def test_without_the_flag_the_service_is_not_there(tiny_server: Server) -> None:
    with Stub(tiny_server.address) as stub, pytest.raises(grpc.RpcError) as caught:
        stub.unary("ServerLive", kserve.ServerLiveRequest())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_stopping_server_answers_what_it_has_read_and_ends_the_stream(tiny_folder: Path) -> None:
    requests: queue.Queue[kserve.ModelInferRequest] = queue.Queue()
    flags = ("--kserve", "--model-name", "tiny", "--grace-s", "30")
    with running("--device", "cpu", "--model-id", str(tiny_folder), *flags) as server, Stub(server.address) as stub:
        answers = stub.stream(iter(requests.get, None))
        requests.put(request("one", id="first"))
        assert next(answers).infer_response.id == "first"
        server.signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "the server is stopping" in caught.value.details()
        requests.put(None)
        assert server.process.wait(timeout=TIMEOUT_S) == 0


def test_a_stream_that_a_client_leaves_harms_nothing(stub: Stub) -> None:
    def some() -> Iterator[kserve.ModelInferRequest]:
        for n in range(50):
            yield request(*["text"] * 20, output="hidden_state_1", id=str(n))

    answers = stub.stream(some())
    assert next(answers).infer_response.id == "0"
    answers.cancel()
    assert vectors(stub.unary("ModelInfer", request("a"))).shape == (1, 32)
