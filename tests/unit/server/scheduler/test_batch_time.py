"""How many tokens a batch may have while callers share the server."""

from __future__ import annotations

import pytest

from layertap_server.scheduler.fairness import TARGET_S, BatchTime

MOST = 1024


def known(*, seconds_a_token: float, fixed_s: float = 0.0, callers: str = "abab") -> BatchTime:
    """Returns what is known once batches as large as allowed have run for a while."""
    found = BatchTime()
    for caller in callers:
        found.arrived(caller, "", now=0.0)
    for _ in range(200):
        count = found.most_tokens(MOST, now=1.0)
        found.ran(count, fixed_s + count * seconds_a_token)
    return found


def test_a_caller_that_is_alone_has_whole_batches() -> None:
    assert known(seconds_a_token=1.0, callers="aaaa").most_tokens(MOST, now=1.0) == MOST


def test_nothing_is_bounded_before_a_batch_has_run() -> None:
    found = BatchTime()
    found.arrived("a", "", now=0.0)
    found.arrived("b", "", now=0.0)
    assert found.most_tokens(MOST, now=1.0) == MOST


@pytest.mark.parametrize("fixed_s", [0.0, 0.004, 0.02])
def test_batches_of_callers_that_share_take_the_target(fixed_s: float) -> None:
    seconds_a_token = 1 / 4500
    count = known(seconds_a_token=seconds_a_token, fixed_s=fixed_s).most_tokens(MOST, now=1.0)
    assert fixed_s + count * seconds_a_token == pytest.approx(TARGET_S, rel=0.05)


def test_connections_of_one_client_share_too() -> None:
    found = known(seconds_a_token=1 / 4500, callers="a")
    found.arrived("a", "another", now=1.0)
    assert found.most_tokens(MOST, now=2.0) < 300


def test_fast_devices_keep_whole_batches() -> None:
    assert known(seconds_a_token=1e-6).most_tokens(MOST, now=1.0) == MOST


def test_a_slow_device_has_a_least() -> None:
    assert known(seconds_a_token=0.1).most_tokens(MOST, now=1.0) == 64


def test_a_caller_is_alone_again_after_a_while() -> None:
    found = known(seconds_a_token=1 / 4500)
    assert found.most_tokens(MOST, now=9.9) < 300
    assert found.most_tokens(MOST, now=10.1) == MOST
