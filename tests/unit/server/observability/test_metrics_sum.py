"""The metrics of several processes as one: what is summed, and of what the least or the most is shown."""

from __future__ import annotations

import pytest

from layertap_server.observability.metrics_sum import MetricsSum, Snapshot


def snapshot(name: str, kind: str, value: float | None, **labels: str) -> Snapshot:
    return [(name, "about", kind, [] if value is None else [(name, labels, value)])]


@pytest.mark.parametrize(
    ("name", "kind", "values", "sum_of_all"),
    [
        ("layertap_queue_size", "gauge", (3.0, 4.0), 7.0),
        ("layertap_serving", "gauge", (1.0, 0.0), 0.0),
        ("layertap_certificate_expiry_timestamp_seconds", "gauge", (2e9, 1.9e9), 1.9e9),
        ("layertap_certificate_expiry_timestamp_seconds", "gauge", (None, None), None),
    ],
)
def test_of_each_gauge_the_sum_or_the_least_is_shown(
    name: str, kind: str, values: tuple[float | None, ...], sum_of_all: float | None
) -> None:
    metrics = MetricsSum(lambda: None, lambda: (2, 2))
    for process, value in enumerate(values, 1):
        metrics.update(process, snapshot(name, kind, value))
    (family,) = (one for one in metrics.collect() if one.name == name)
    assert [sample.value for sample in family.samples] == ([] if sum_of_all is None else [sum_of_all])
