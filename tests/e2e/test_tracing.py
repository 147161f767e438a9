"""Spans: their names, whose children they are, where they lie in time. A collector of our own receives them."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from support import running

from layertap._protocol.inputs import to_messages
from layertap.errors import CancelledError, InvalidArgumentError, LayertapError
from layertap.v1 import embedding_pb2 as pb
from layertap.v1 import embedding_pb2_grpc
from layertap_server.app.server import App
from layertap_server.config import Config, ConfigError
from layertap_server.observability.call_log import CallLog
from layertap_server.observability.tracing import Tracing

WAIT_S = 30.0
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
JOINED = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
MARKER = "xyzzymarker"
SERVICES = {
    "Embed": "layertap.v1.EmbeddingService",
    "ModelInfer": "inference.GRPCInferenceService",
    "POST /v1/embeddings": "",
}


@dataclasses.dataclass(frozen=True)
class Collector:
    """Where spans are sent to, and what has come."""

    port: int
    requests: list[trace_service_pb2.ExportTraceServiceRequest]

    @property
    def spans(self) -> list[trace_pb2.Span]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@pytest.fixture
def collector() -> Iterator[Collector]:
    requests: list[trace_service_pb2.ExportTraceServiceRequest] = []

    def export(request: trace_service_pb2.ExportTraceServiceRequest, _: object) -> object:
        requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    handler = grpc.unary_unary_rpc_method_handler(
        export,
        request_deserializer=trace_service_pb2.ExportTraceServiceRequest.FromString,
        response_serializer=trace_service_pb2.ExportTraceServiceResponse.SerializeToString,
    )
    name = "opentelemetry.proto.collector.trace.v1.TraceService"
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {"Export": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield Collector(port, requests)
    server.stop(None).wait(WAIT_S)


def test_a_server_sends_the_spans_of_each_call_joined_to_its_callers(tiny_folder: Path, collector: Collector) -> None:
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}", "OTEL_SERVICE_NAME": "mine"}
    request = pb.EmbedRequest(inputs=to_messages([MARKER, "Hello"]))
    request.options.outputs.add().pooled_vectors.strategy = pb.POOLING_STRATEGY_MEAN
    layers = pb.EmbedLayersRequest(inputs=request.inputs)
    layers.options.outputs.add().hidden_states.all_layers = True
    bad = pb.EmbedRequest(inputs=request.inputs)
    bad.options.outputs.add().hidden_states.layers.append(99)
    flags = ("--device", "cpu", "--model-id", str(tiny_folder), "--traces", "otlp")
    began_ns = time.time_ns()
    with running(*flags, environment=environment) as server:
        with grpc.insecure_channel(server.address) as channel:
            stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
            stub.Embed(request, timeout=WAIT_S, metadata=(*JOINED.items(), ("x-request-id", "joined")))
            assert len(list(stub.EmbedLayers(layers, timeout=WAIT_S))) > 2
            with pytest.raises(grpc.RpcError):
                stub.Embed(bad, timeout=WAIT_S)
        assert server.stop() == 0
    spans = collector.spans
    (attributes,) = [
        {one.key: one.value.string_value for one in resource.resource.attributes}
        for resource in collector.requests[0].resource_spans
    ]
    assert attributes["service.name"] == "mine"
    calls = sorted((span for span in spans if "/" in span.name), key=lambda span: span.start_time_unix_nano)
    assert [span.name.split(".")[-1] for span in calls] == [
        "EmbeddingService/Embed",
        "EmbeddingService/EmbedLayers",
        "EmbeddingService/Embed",
    ]
    good, streamed, failed = calls
    assert good.trace_id.hex() == TRACE and good.parent_span_id.hex() == PARENT
    assert not streamed.parent_span_id and streamed.trace_id != good.trace_id
    assert [span.status.code for span in calls] == [0, 0, trace_pb2.Status.STATUS_CODE_ERROR]
    assert failed.status.message.startswith("INVALID_ARGUMENT: options.outputs[0]")
    told = {one.key: one.value for one in good.attributes}
    assert told["layertap.request_id"].string_value == "joined" and told["layertap.text_count"].int_value == 2
    for call, names in ((good, 4), (streamed, 4), (failed, 0)):
        parts = [span for span in spans if span.parent_span_id == call.span_id]
        assert sorted(part.name for part in parts) == ["compute", "queue", "send", "tokenize"][:names]
        assert all(part.trace_id == call.trace_id for part in parts)
        for part in parts:
            assert part.start_time_unix_nano <= part.end_time_unix_nano
            assert call.start_time_unix_nano <= part.start_time_unix_nano
            assert part.end_time_unix_nano <= call.end_time_unix_nano
        assert began_ns < call.start_time_unix_nano < call.end_time_unix_nano < time.time_ns()
    assert not any(MARKER.encode() in one.SerializeToString() for one in collector.requests)


def recorded(
    error: LayertapError | None, *, metadata: dict[str, str], share: float = 1.0, method: str = "Embed"
) -> Sequence[object]:
    """Returns the spans of one call that ends at once."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(share)), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing = Tracing(provider, SERVICES)
    call_log = CallLog([tracing])
    record = call_log.open(method, client="me", metadata=dict(metadata))
    now = time.monotonic_ns()
    record.tokenize.note(now, now + 1)
    if error is not None:
        record.fail(error)
    call_log.close(record)
    spans = exporter.get_finished_spans()
    tracing.close()
    return spans


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "UNSET"), (CancelledError("left"), "UNSET"), (InvalidArgumentError("wrong"), "ERROR")],
    ids=["ok", "cancelled", "wrong"],
)
def test_errors_are_marked_as_errors(error: LayertapError | None, status: str) -> None:
    part, call = recorded(error, metadata=JOINED)
    assert (part.name, call.name) == ("tokenize", "layertap.v1.EmbeddingService/Embed")
    assert call.status.status_code.name == status and part.status.status_code.name == "UNSET"
    assert call.attributes["rpc.grpc.status_code"] == (0 if error is None else int(error.code))


def test_calls_over_http_are_named_by_their_route() -> None:
    _, call = recorded(None, metadata=JOINED, method="POST /v1/embeddings")
    assert call.name == "POST /v1/embeddings" and "rpc.system" not in call.attributes
    assert call.attributes["http.request.method"] == "POST" and call.attributes["http.route"] == "/v1/embeddings"


def test_calls_of_another_service_are_named_by_it() -> None:
    _, call = recorded(None, metadata=JOINED, method="ModelInfer")
    assert call.name == "inference.GRPCInferenceService/ModelInfer"
    assert call.attributes["rpc.service"] == "inference.GRPCInferenceService"


def test_the_caller_and_the_sampler_decide_what_is_recorded() -> None:
    assert not recorded(None, metadata={"traceparent": JOINED["traceparent"][:-1] + "0"})
    assert len(recorded(None, metadata=JOINED, share=0.0)) == 2
    assert not recorded(None, metadata={}, share=0.0)


@pytest.mark.parametrize("sent", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01"])
def test_a_header_that_is_none_begins_a_trace_of_its_own(sent: str) -> None:
    part, call = recorded(None, metadata={"traceparent": sent})
    assert call.parent is None and part.parent.span_id == call.context.span_id


def test_a_variable_that_cannot_be_used_is_refused_in_one_line(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "brotli")
    app = App(Config(model_id=str(tiny_folder), device="cpu", port=0, traces="otlp"))
    with pytest.raises(ConfigError, match=r"--traces otlp: .*OTEL_EXPORTER_OTLP_COMPRESSION.*; correct or unset it"):
        app.prepare()
