"""Kernels that are faster where a device has them: tried once, and used only if they are right and faster."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.device_runs import (
    HIDDEN_SIZE,
)
from support.simulated_gpu import SimulatedGpu
from torch.nn import functional as F

from layertap_server.engine.device_attention import DeviceAttention
from layertap_server.engine.fast_path import tried


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no cuda")
@pytest.mark.parametrize("size", [32, 100, 768])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_of_residual_and_norm(size: int, dtype: torch.dtype) -> None:
    from layertap_server.engine.norm_kernel import add_norm

    generator = torch.Generator().manual_seed(0)
    added, rows = (torch.randn(5, size, generator=generator).cuda() for _ in range(2))
    weight, bias = (torch.randn(size, generator=generator).cuda() for _ in range(2))
    found, cast = add_norm(added.to(dtype), rows, weight, bias, 1e-12)
    wanted = F.layer_norm(added.to(dtype).float() + rows, [size], weight, bias, 1e-12)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert cast.dtype is dtype and torch.equal(cast, found.to(dtype))


def _slower(numbers: torch.Tensor) -> torch.Tensor:
    return numbers + 1


def _wrong(numbers: torch.Tensor) -> torch.Tensor:
    return numbers + 1.1


def _raises(numbers: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no such kernel")


def _not_a_number(numbers: torch.Tensor) -> torch.Tensor:
    return numbers + torch.nan


def _missing() -> Callable[[torch.Tensor], torch.Tensor]:
    raise ImportError("no such module")


@pytest.mark.parametrize(
    ("fast", "prefers_fast", "why"),
    [
        (lambda: _slower, False, "not used (0.50 times as fast"),
        (lambda: _wrong, True, "its numbers differ"),
        (lambda: _not_a_number, True, "its numbers differ"),
        (lambda: _raises, True, "no such kernel"),
        (_missing, True, "no such module"),
    ],
    ids=["slower", "wrong", "NaN", "raises", "missing"],
)
def test_a_fast_path_that_is_no_good_is_not_used(
    fast: Callable[[], Callable[[torch.Tensor], torch.Tensor]],
    prefers_fast: bool,
    why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def plain(numbers: torch.Tensor) -> torch.Tensor:
        return numbers + 1

    with caplog.at_level("INFO"):
        found = tried(
            "adding",
            plain,
            fast,
            lambda way: [way(torch.zeros(3))],
            runtime=SimulatedGpu(prefers_fast=prefers_fast),
            tolerance=0.01,
        )
    assert found.better is plain and not found.is_faster
    assert "adding" in caplog.text and why in caplog.text


def test_a_fast_path_that_is_good_is_used() -> None:
    found = tried(
        "adding",
        lambda numbers: numbers + 1,
        lambda: _slower,
        lambda way: [way(torch.zeros(3))],
        runtime=SimulatedGpu(),
        tolerance=0.01,
    )
    assert found.better is _slower


def test_a_varying_attention_that_is_right_and_slow_still_serves_the_graphs(caplog: pytest.LogCaptureFixture) -> None:
    attentions = {
        name: DeviceAttention(gpu, dtype=torch.bfloat16, head_count=4, hidden_size=HIDDEN_SIZE)
        for name, gpu in (("slow", SimulatedGpu(prefers_fast=False)), ("none", SimulatedGpu(varlen=False)))
    }
    assert attentions["slow"].varlen is not None and attentions["none"].varlen is None
    wrong = SimulatedGpu()
    wrong.varlen_attention = lambda query, key, value, bounds, longest: value * 1.1
    with caplog.at_level("INFO"):
        assert DeviceAttention(wrong, dtype=torch.bfloat16, head_count=4, hidden_size=HIDDEN_SIZE).varlen is None
    assert "its numbers differ" in caplog.text
