"""Calls as OpenTelemetry spans: one for the RPC, joined to the caller's, and below it tokenize, queue, compute, send.

Spans are made of a call's record when it has ended, so a call under way costs nothing more. A phase that a call came
through several times is one span, from its first beginning to its last end. The only module that knows opentelemetry;
the standard OTEL_… variables set where spans go, under which name, and how many of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Final

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import layertap
from layertap.errors import StatusCode
from layertap_server.observability.call_log import Record

_PHASES: Final = ("tokenize", "queue", "compute", "send")


def otlp_provider() -> TracerProvider:
    """Returns what sends spans over OTLP/gRPC; OTEL_EXPORTER_OTLP_ENDPOINT and its like say where to."""
    own = {"service.version": layertap.__version__}
    if not os.environ.get("OTEL_SERVICE_NAME"):
        own["service.name"] = "layertap-server"
    provider = TracerProvider(resource=Resource.create(own), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def _protocol(record: Record, service: str) -> tuple[str, dict[str, str | int]]:
    """Returns the name of a call's span, and what it says of gRPC or HTTP."""
    if not service:
        verb, _, route = record.method.partition(" ")
        return record.method, {"http.request.method": verb, "http.route": route}
    return f"{service}/{record.method}", {
        "rpc.system": "grpc",
        "rpc.service": service,
        "rpc.method": record.method,
        "rpc.grpc.status_code": 0 if record.code is None else int(record.code),
    }


class Tracing:
    """Makes spans of the records of calls.

    Args:
        provider: What sends them.
        services: The gRPC service of each method that calls may have; empty for those over HTTP.
    """

    def __init__(self, provider: TracerProvider, services: Mapping[str, str]) -> None:
        self._provider = provider
        self._services = services
        self._tracer = provider.get_tracer("layertap_server")
        self._propagator = TraceContextTextMapPropagator()

    def started(self, record: Record) -> None:
        """See `call_log.CallObserver`."""

    def ended(self, record: Record) -> None:
        """See `call_log.CallObserver`."""
        # Spans tell the time of day, records a clock that is never set.
        offset_ns = time.time_ns() - time.monotonic_ns()
        name, protocol = _protocol(record, self._services[record.method])
        span = self._tracer.start_span(
            name,
            context=self._propagator.extract(record.trace),
            kind=trace.SpanKind.SERVER,
            start_time=record.started_at_ns + offset_ns,
            attributes={
                **protocol,
                "layertap.request_id": record.request_id,
                "layertap.text_count": record.text_count,
                "layertap.token_count": record.token_count,
                "layertap.sent_bytes": record.sent_bytes,
            },
        )
        if span.is_recording():
            inside = trace.set_span_in_context(span)
            for name in _PHASES:
                phase = getattr(record, name)
                if phase.started_at_ns:
                    part = self._tracer.start_span(
                        name,
                        context=inside,
                        start_time=phase.started_at_ns + offset_ns,
                        attributes={"layertap.time_ms": phase.time_ns / 1e6},
                    )
                    part.end(phase.ended_at_ns + offset_ns)
            # A caller that leaves is no error.
            if record.code not in (None, StatusCode.CANCELLED):
                span.set_status(trace.StatusCode.ERROR, f"{record.code_name}: {record.error}")
        span.end(record.ended_at_ns + offset_ns)

    def close(self) -> None:
        """Sends what is left; may take as long as OTEL_EXPORTER_OTLP_TIMEOUT."""
        self._provider.shutdown()
