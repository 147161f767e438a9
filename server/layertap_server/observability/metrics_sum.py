"""The metrics of several processes as one: what a server of one process would show.

Rules:
- Counters and histograms are summed, and so is a gauge unless it is no amount: see `_HOW`.
- What a process has counted stays when it ends: a sum that falls would look like a restart of the server.
- A process that does not answer counts as it last did.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeAlias

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

Snapshot: TypeAlias = Sequence[Sequence[Any]]
"""The metrics of one process as JSON has them: name, description, type, and samples of name, labels and value."""

_Labels: TypeAlias = tuple[tuple[str, str], ...]

_COUNTED: Final = ("counter", "histogram")

_HOW: Final[dict[str, Callable[[float, float], float]]] = {
    "layertap_serving": min,
    "layertap_server_info": max,
    "layertap_certificate_expiry_timestamp_seconds": min,
    "process_start_time_seconds": min,
    "layertap_device_memory_bytes{free}": min,
    "layertap_device_memory_bytes{total}": max,
}
"""How two values of a gauge become one, where they are not summed; by its name, and its kind if it has one."""


class MetricsSum(Collector):
    """The sums. Threads may share it.

    Args:
        refresh: Called before each scrape; calls `update` for the processes that answer.
        processes: Returns how many processes there should be, and how many serve.
    """

    def __init__(self, refresh: Callable[[], None], processes: Callable[[], tuple[int, int]]) -> None:
        self._refresh, self._processes = refresh, processes
        self._lock = threading.Lock()
        self._latest: dict[int, Snapshot] = {}
        self._ended: dict[str, dict[tuple[str, _Labels], float]] = {}
        self._death_count = 0

    def registry(self) -> CollectorRegistry:
        """Returns a registry that has nothing but the sums."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return registry

    def update(self, process: int, found: Snapshot) -> None:
        """Replaces what is known of a process."""
        with self._lock:
            self._latest[process] = found

    def ended(self, process: int, *, died: bool) -> None:
        """Keeps what a process has counted, and whether a fault has ended it; its gauges go."""
        with self._lock:
            self._death_count += died
            for name, _, kind, samples in self._latest.pop(process, ()):
                if kind in _COUNTED:
                    _add(self._ended.setdefault(name, {}), samples)

    def collect(self) -> Iterator[Metric]:
        """Yields the sums, and the state of the processes."""
        self._refresh()
        with self._lock:
            latest, ended = list(self._latest.values()), {name: dict(sums) for name, sums in self._ended.items()}
            death_count = self._death_count
        families: dict[str, Metric] = {}
        sums: dict[str, dict[tuple[str, _Labels], float]] = {}
        for found in latest:
            for name, about, kind, samples in found:
                families.setdefault(name, Metric(name, about, kind))
                _add(sums.setdefault(name, ended.get(name, {})), samples)
        for name, family in families.items():
            for (sample, labels), value in sums[name].items():
                family.add_sample(sample, dict(labels), value)
            yield family
        wanted, serving = self._processes()
        yield GaugeMetricFamily("layertap_processes", "Processes that there should be.", value=wanted)
        yield GaugeMetricFamily("layertap_processes_serving", "Processes that serve.", value=serving)
        yield CounterMetricFamily("layertap_process_deaths", "Processes that ended by a fault.", value=death_count)


def _add(sums: dict[tuple[str, _Labels], float], samples: Sequence[Any]) -> None:
    for name, labels, value in samples:
        key = name, tuple(sorted(labels.items()))
        how = min if name.endswith("_created") else _HOW.get(name) or _HOW.get(f"{name}{{{labels.get('kind')}}}")
        before = sums.get(key)
        sums[key] = value if before is None else how(before, value) if how else before + value
