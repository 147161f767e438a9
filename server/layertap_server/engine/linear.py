"""The dense layers of the encoder, as fast as the device has them.

On the CPU, oneDNN multiplies faster by weights that were laid out for it once, and can apply GELU on the way. Torch
reaches it by private operators, which only this file uses. `Linears` tries them at start and keeps to
`F.linear` where they are missing, slower, or give other numbers. `dense` is written so that torch can compile it.
"""

import logging
import math
import time
from typing import Final, NamedTuple

import torch
from torch.nn import functional as F

from layertap_server.model.settings import ModelSettings

log = logging.getLogger(__name__)

_TOLERANCE: Final = 2e-5
_PROBE_ROWS: Final = 256
_PROBE_ROUNDS: Final = 7
_CLEARLY_SLOWER: Final = 0.8
"""Packing is used above this ratio of speeds. A ratio near 1 would fall differently at each start of a server, and the
two ways give different bits."""
_ROW_STEPS: Final = ((16, 1), (64, 2))
"""Up to how many rows their number goes by which step."""
_LARGEST_ROW_STEP: Final = 8
_TAIL: Final = 64
"""Values at the end of a tensor, or of a thread's part of it, that an activation may compute in another way than the
rest. Differences are too rare for a probe to find."""


class Dense(NamedTuple):
    """The numbers of one dense layer.

    Attributes:
        weight: Shape: [out_size, in_size], or as oneDNN has laid it out.
        bias: Shape: [out_size].
    """

    weight: torch.Tensor
    bias: torch.Tensor


def dense(rows: torch.Tensor, layer: Dense, packed: bool, gelu: bool) -> torch.Tensor:
    """Applies a dense layer, and GELU if asked. Shape: [row_count, in_size] to [row_count, out_size]."""
    if packed:
        after = "gelu" if gelu else "none"
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, layer.weight, layer.bias, after, [], "none")
        return result
    rows = F.linear(rows, layer.weight, layer.bias)
    return F.gelu(rows) if gelu else rows


class Linears:
    """Makes and applies dense layers, by the way that a probe found better.

    Attributes:
        device: Where they compute.
        dtype: What they compute in.
        packed: Whether weights are laid out for oneDNN.
    """

    def __init__(
        self, settings: ModelSettings, *, device: torch.device, dtype: torch.dtype, packing: bool | None = None
    ) -> None:
        """Probes with the shape of the model's largest matrix.

        `packing` says whether to lay weights out for oneDNN; None: if the probe finds that it pays.
        """
        self.device = device
        self.dtype = dtype
        self.packed = device.type == "cpu" and (
            _packing_pays(dtype, settings.hidden_size, settings.intermediate_size) if packing is None else packing
        )

    def padded(self, row_count: int) -> int:
        """Returns how many rows to run so many as: a few more where that spares oneDNN work.

        oneDNN compiles a program for each number of rows that it meets, which takes a tenth of the time of a batch of
        150, and keeps the last thousand programs. A batch may have any number of rows, so few numbers are used: 160
        of the first 1,024.
        """
        if not self.packed:
            return row_count
        step = next((step for most, step in _ROW_STEPS if row_count <= most), _LARGEST_ROW_STEP)
        return -(-row_count // step) * step

    def make(self, weight: torch.Tensor, bias: torch.Tensor) -> Dense:
        """Returns a dense layer on the device. Shape: [out_size, in_size] and [out_size]."""
        layer = Dense(weight.to(self.device, self.dtype), bias.to(self.device, self.dtype))
        return _pack(layer) if self.packed else layer

    def __call__(self, rows: torch.Tensor, layer: Dense) -> torch.Tensor:
        """Applies a dense layer. Shape: [row_count, in_size], float32, to [row_count, out_size], float32."""
        return dense(rows.to(self.dtype), layer, self.packed, False).float()


def row_step(size: int) -> int:
    """Returns by which step numbers of rows of a size must go, so that a tensor of them has no tail; see `_TAIL`."""
    return _TAIL // math.gcd(_TAIL, size)


def filled_up(rows: torch.Tensor, row_count: int) -> torch.Tensor:
    """Returns so many rows: those given, and zeros. Shape: [fewer rows, size] to [row_count, size]."""
    more = row_count - len(rows)
    return F.pad(rows, (0, 0, 0, more)) if more else rows


def _pack(layer: Dense) -> Dense:
    return Dense(torch.ops.mkldnn._reorder_linear_weight(layer.weight.contiguous()), layer.bias)


def _packing_pays(dtype: torch.dtype, in_size: int, out_size: int) -> bool:
    try:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(_PROBE_ROWS, in_size, generator=generator).to(dtype)
        weight = (torch.randn(out_size, in_size, generator=generator) / in_size**0.5).to(dtype)
        plain = Dense(weight, torch.randn(out_size, generator=generator).to(dtype))
        layers = {False: plain, True: _pack(plain)}
        results = [dense(rows, layer, packed, True) for packed, layer in layers.items()]
        difference = (results[0] - results[1]).abs().max().item()
        times = {False: [0.0] * _PROBE_ROUNDS, True: [0.0] * _PROBE_ROUNDS}
        for attempt in range(_PROBE_ROUNDS):
            for packed, layer in layers.items():
                started = time.perf_counter()
                dense(rows, layer, packed, True)
                times[packed][attempt] = time.perf_counter() - started
    except Exception as exc:  # Private operators may be missing or changed in any way.
        log.info("prepacked linears are not available in torch %s (%s)", torch.__version__, type(exc).__name__)
        return False
    ratio = sorted(times[False])[_PROBE_ROUNDS // 2] / sorted(times[True])[_PROBE_ROUNDS // 2]
    tolerance = _TOLERANCE if dtype is torch.float32 else 0.05
    pays = ratio > _CLEARLY_SLOWER and difference <= tolerance
    log.info(
        "prepacked linears: %s (%.2f times as fast as F.linear, largest difference %.1e)",
        "used" if pays else "not used",
        ratio,
        difference,
    )
    return pays
