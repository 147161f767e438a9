"""Metrics for Prometheus: one registry of the server's own, and the HTTP server that shows it.

Names follow text-embeddings-inference's `te_…` under our own prefix, and Prometheus' rules for units and counters. What
can be looked up is read only at a scrape; the rest costs a call a few microseconds at its end. The only module that
knows prometheus_client.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

import layertap
from layertap_server.observability.bounded_streams import dropped_line_count
from layertap_server.observability.call_log import Record
from layertap_server.observability.metrics_sum import Snapshot
from layertap_server.scheduler.call import REASONS, BatchPart, Hooks

Registry = prometheus_client.CollectorRegistry

_DURATIONS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_COUNTS: Final = tuple(2**n for n in range(12))
_TOKENS: Final = tuple(2**n for n in range(3, 18))
_SHARES: Final = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def _gauge(about: str) -> Any:
    return dataclasses.field(metadata={"about": about})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The state of a server at the time of a scrape: a gauge for each field with a description.

    Attributes:
        certificate_expiry_timestamp_seconds: None: there is no certificate.
        device_memory: Bytes by device and kind; empty where the device is the CPU.
    """

    serving: bool = _gauge("1 while the health is SERVING.")
    queue_size: int = _gauge("Texts that wait.")
    queue_tokens: int = _gauge("Tokens that wait.")
    output_held_bytes: int = _gauge("Bytes computed or being computed, and unsent.")
    output_limit_bytes: int = _gauge("The most of them.")
    instances: int = _gauge("Instances at the start.")
    instances_live: int = _gauge("Instances that are not lost.")
    instances_busy: int = _gauge("Instances with a batch.")
    certificate_expiry_timestamp_seconds: float | None = _gauge(
        "When the first certificate in force expires, in seconds since the epoch."
    )
    device_memory: Mapping[tuple[str, str], int]


class Metrics(Hooks):
    """The metrics of one server: an observer of the call log, and the hooks of the scheduler and of admission."""

    def __init__(self, *, model_id: str, fingerprint: str, methods: Sequence[str], max_batch_tokens: int) -> None:
        """Makes the metrics of a server, none counted yet."""
        self.registry = prometheus_client.CollectorRegistry()
        self._following = False
        self._max_batch_tokens = max_batch_tokens
        started = self._counter("request_started", "Calls that have arrived.", ("method",))
        handled = self._counter("request_handled", "Calls that have their status.", ("method", "code"))
        duration = self._histogram("request_duration_seconds", "From arrival to status.", _DURATIONS_S, ("method",))
        refusals = self._counter("refusal", "Calls refused before any work.", ("reason",))
        self._started = {method: started.labels(method) for method in methods}
        self._durations = {method: duration.labels(method) for method in methods}
        self._refusals = {reason: refusals.labels(reason) for reason in REASONS}
        # Children are kept: looking one up by its labels costs more than counting.
        self._handled = functools.cache(handled.labels)
        for method in methods:
            self._handled(method, "OK")
        self._stalls = self._counter("stall", "Calls dropped because their answer was not read.")
        self._tokenization = self._histogram(
            "request_tokenization_duration_seconds", "Texts of one call becoming tokens.", _DURATIONS_S
        )
        self._queueing = self._histogram(
            "request_queue_duration_seconds", "From admission to a batch, for each call in each batch.", _DURATIONS_S
        )
        self._batch_texts = self._histogram("batch_texts", "Texts of a batch.", _COUNTS)
        self._batch_tokens = self._histogram("batch_tokens", "Tokens of a batch.", _TOKENS)
        self._batch_fill = self._histogram(
            "batch_fill_ratio", "Tokens of a batch, of the most that one holds.", _SHARES
        )
        self._batch_duration = self._histogram(
            "batch_inference_duration_seconds",
            "The time of a batch in its instance, events included, pauses for short calls left out.",
            _DURATIONS_S,
        )
        info = prometheus_client.Info("layertap_server", "What is served.", registry=self.registry)
        info.info({"version": layertap.__version__, "model_id": model_id, "fingerprint": fingerprint})
        self._totals = _Totals(methods)
        self.registry.register(self._totals)
        prometheus_client.ProcessCollector(registry=self.registry)

    def follow(self, state: Callable[[], State]) -> None:
        """Registers the state of the server, which is read in a thread of the HTTP server at each scrape.

        Batches that ran before are the warm-up's and do not count.
        """
        self._following = True
        self.registry.register(_States(state))

    def snapshot(self) -> Snapshot:
        """Returns what is counted now, for another process to sum."""
        return [
            (
                one.name,
                one.documentation,
                one.type,
                [(sample.name, sample.labels, sample.value) for sample in one.samples],
            )
            for one in self.registry.collect()
        ]

    def started(self, record: Record) -> None:
        """See `call_log.CallObserver`."""
        self._started[record.method].inc()
        self._totals.began(record)

    def ended(self, record: Record) -> None:
        """See `call_log.CallObserver`."""
        self._handled(record.method, record.code_name).inc()
        self._durations[record.method].observe(record.duration_ns / 1e9)
        if record.tokenize.started_at_ns:
            self._tokenization.observe(record.tokenize.time_ns / 1e9)
        if record.stalled:
            self._stalls.inc()
        self._totals.ended(record)

    def ran(self, batch: Sequence[BatchPart], *, started_at_ns: int, compute_time_ns: int) -> None:
        """See `call.Hooks`."""
        if not self._following:
            return
        tokens = sum(text.token_count for part in batch for text in part.texts)
        self._batch_texts.observe(sum(len(part.texts) for part in batch))
        self._batch_tokens.observe(tokens)
        self._batch_fill.observe(tokens / self._max_batch_tokens)
        self._batch_duration.observe(compute_time_ns / 1e9)
        for part in batch:
            self._queueing.observe((started_at_ns - part.admitted_at_ns) / 1e9)

    def refused(self, reason: str) -> None:
        """See `call.Hooks`."""
        self._refusals[reason].inc()

    def _counter(self, name: str, about: str, labels: Sequence[str] = ()) -> prometheus_client.Counter:
        return prometheus_client.Counter(f"layertap_{name}", about, labels, registry=self.registry)

    def _histogram(
        self, name: str, about: str, buckets: Sequence[float], labels: Sequence[str] = ()
    ) -> prometheus_client.Histogram:
        return prometheus_client.Histogram(f"layertap_{name}", about, labels, buckets=buckets, registry=self.registry)


class Endpoint:
    """The HTTP server of the metrics, in threads of its own."""

    def __init__(self, registry: Registry, host: str, port: int) -> None:
        """Listens.

        Raises:
            OSError: if the address cannot be listened on.
        """
        self._server, self._thread = prometheus_client.start_http_server(port, addr=host, registry=registry)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_port}/metrics"

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


_TOTALS: Final = {
    "request_texts": ("text_count", "Texts taken in: admitted, where there is a queue."),
    "request_tokens": ("token_count", "Tokens of the texts taken in."),
    "request_failed_texts": ("failed_text_count", "Texts of streams that were answered with an error of their own."),
    "response_bytes": ("sent_bytes", "Bytes of the messages sent."),
}
"""By metric: the field of a record, and its description."""


class _Totals(Collector):
    """The sums of all records, those of calls under way included: a stream may last for days."""

    def __init__(self, methods: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self._live: set[Record] = set()
        self._ended = {method: [0] * len(_TOTALS) for method in methods}

    def began(self, record: Record) -> None:
        with self._lock:
            self._live.add(record)

    def ended(self, record: Record) -> None:
        with self._lock:
            self._live.discard(record)
            _add(self._ended[record.method], record)

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            sums = {method: list(values) for method, values in self._ended.items()}
            for record in self._live:
                _add(sums[record.method], record)
        for n, (name, (_, about)) in enumerate(_TOTALS.items()):
            family = CounterMetricFamily(f"layertap_{name}", about, labels=["method"])
            for method, values in sums.items():
                family.add_metric([method], values[n])
            yield family


def _add(sums: list[int], record: Record) -> None:
    for n, (field, _) in enumerate(_TOTALS.values()):
        sums[n] += getattr(record, field)


class _States(Collector):
    """The state of the server, read at each scrape."""

    def __init__(self, state: Callable[[], State]) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        state = self._state()
        for field in dataclasses.fields(state):
            if about := field.metadata.get("about"):
                value = getattr(state, field.name)
                yield GaugeMetricFamily(f"layertap_{field.name}", about, value=None if value is None else float(value))
        yield CounterMetricFamily(
            "layertap_log_dropped_lines",
            "Lines of the log that were dropped, because they were not read or could not be written.",
            value=dropped_line_count(),
        )
        memory = GaugeMetricFamily(
            "layertap_device_memory_bytes",
            "Memory of a device: allocated for tensors, reserved by the allocator, free and total.",
            labels=["device", "kind"],
        )
        for labels, value in state.device_memory.items():
            memory.add_metric(labels, value)
        yield memory
