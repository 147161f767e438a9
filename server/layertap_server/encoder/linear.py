"""The dense layers of the encoder, as fast as the device has them.

On the CPU, oneDNN multiplies faster by weights that were laid out for it once, and can apply GELU on the way. Torch
reaches it by private operators; this file is the only door to them. `Linears` tries them at start and keeps to
`F.linear` where they are missing, slower, or give other numbers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

import torch
from torch.nn import functional as F

log = logging.getLogger(__name__)

Activation = Callable[[torch.Tensor], torch.Tensor]
Linear = Callable[[torch.Tensor], torch.Tensor]
"""Shape: [row_count, in_size] to [row_count, out_size]."""

_TOLERANCE: Final = 2e-5
_PROBE_ROWS: Final = 256
_PROBE_ROUNDS: Final = 7


class Linears:
    """Makes dense layers of one dtype on one device, by whichever way a probe found better."""

    def __init__(self, *, device: torch.device, dtype: torch.dtype, hidden_size: int, intermediate_size: int) -> None:
        """Probes with the shape of the model's largest matrix."""
        self._device = device
        self._dtype = dtype
        self.packed = device.type == "cpu" and _packing_pays(dtype, hidden_size, intermediate_size)

    def make(self, weight: torch.Tensor, bias: torch.Tensor, activation: Activation | None = None) -> Linear:
        """Returns a dense layer, followed by an activation if one is given.

        Args:
            weight: Shape: [out_size, in_size].
            bias: Shape: [out_size].
            activation: Applied to the result.
        """
        weight = weight.to(self._device, self._dtype)
        bias = bias.to(self._device, self._dtype)
        return _packed(weight, bias, activation) if self.packed else _plain(weight, bias, activation)


def _plain(weight: torch.Tensor, bias: torch.Tensor, activation: Activation | None) -> Linear:
    if activation is None:
        return lambda rows: F.linear(rows, weight, bias)
    return lambda rows: activation(F.linear(rows, weight, bias))


def _packed(weight: torch.Tensor, bias: torch.Tensor, activation: Activation | None) -> Linear:
    operators = torch.ops.mkldnn
    packed = operators._reorder_linear_weight(weight.contiguous())
    run = operators._linear_pointwise.default
    if activation is F.gelu:
        return lambda rows: run(rows, packed, bias, "gelu", [], "none")
    if activation is None:
        return lambda rows: run(rows, packed, bias, "none", [], "")
    return lambda rows: activation(run(rows, packed, bias, "none", [], ""))


def _packing_pays(dtype: torch.dtype, in_size: int, out_size: int) -> bool:
    try:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(_PROBE_ROWS, in_size, generator=generator).to(dtype)
        weight = (torch.randn(out_size, in_size, generator=generator) / in_size**0.5).to(dtype)
        bias = torch.randn(out_size, generator=generator).to(dtype)
        plain, packed = _plain(weight, bias, F.gelu), _packed(weight, bias, F.gelu)
        difference = (plain(rows) - packed(rows)).abs().max().item()
        times = {plain: [0.0] * _PROBE_ROUNDS, packed: [0.0] * _PROBE_ROUNDS}
        for turn in range(_PROBE_ROUNDS):
            for linear, taken in times.items():
                started = time.perf_counter()
                linear(rows)
                taken[turn] = time.perf_counter() - started
    except Exception as exc:  # Private operators may be missing or changed in any way.
        log.info("prepacked linears are not available in torch %s (%s)", torch.__version__, type(exc).__name__)
        return False
    ratio = sorted(times[plain])[_PROBE_ROUNDS // 2] / sorted(times[packed])[_PROBE_ROUNDS // 2]
    tolerance = _TOLERANCE if dtype is torch.float32 else 0.05
    pays = ratio > 1.0 and difference <= tolerance
    log.info(
        "prepacked linears: %s (%.2f times as fast as F.linear, largest difference %.1e)",
        "used" if pays else "not used",
        ratio,
        difference,
    )
    return pays
