"""An encoder block step by step: by ordinary functions, or by what an accelerator has that is faster.

Matrix products in half precision are so fast on a GPU that what stands between them takes as long. Two fast ways are
tried at start: GELU inside the matrix product, and residual, LayerNorm and cast in one kernel.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Final

import torch
from torch.nn import functional as F

from layertap_server.engine.block import Norm
from layertap_server.engine.fast_path import tried
from layertap_server.engine.linear import Dense
from layertap_server.engine.runtime import Runtime

AddNorm = Callable[[torch.Tensor, torch.Tensor, Norm], tuple[torch.Tensor, torch.Tensor]]
"""Adds rows in the compute dtype to the float32 rows, then LayerNorm; returns the result in float32 and in the compute
dtype. Shape of all: [row_count, hidden_size]."""
Linear = Callable[[torch.Tensor, Dense], torch.Tensor]
"""Applies a dense layer. Shape: [row_count, in_size] to [row_count, out_size]."""

_TRIAL_ROWS: Final = 1024
"""Different rows of a trial; the device gets them repeated."""
_TOLERANCE: Final = 1e-2
"""Twice the rounding of bfloat16."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """An encoder block, attention aside.

    Attributes:
        ffn_up: The first half of the feed-forward network, with its activation.
        add_norm: Residual and LayerNorm.
    """

    linear: Linear
    ffn_up: Linear
    add_norm: AddNorm


def plain_steps(linear: Linear, activation: Callable[[torch.Tensor], torch.Tensor], epsilon: float) -> Steps:
    """Returns the steps by torch's ordinary functions."""

    def add_norm(added: torch.Tensor, rows: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
        found = F.layer_norm(added + rows, [rows.size(1)], norm.weight, norm.bias, epsilon)
        return found, found.to(added.dtype)

    return Steps(linear=linear, ffn_up=lambda rows, layer: activation(linear(rows, layer)), add_norm=add_norm)


def device_steps(plain: Steps, *, gelu: bool, epsilon: float, norm: Norm, up: Dense, runtime: Runtime) -> Steps:
    """Returns the best steps of a device in half precision.

    `norm` and `up` are layers of the model, for the trial.
    """
    dtype, hidden_size = up.weight.dtype, up.weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(_TRIAL_ROWS, hidden_size, generator=generator).to(runtime.device)
    rows = some.repeat(-(-runtime.trial_rows // _TRIAL_ROWS), 1)
    cast = rows.to(dtype)

    def one_kernel() -> AddNorm:
        from layertap_server.engine.norm_kernel import add_norm

        return lambda added, rows, norm: add_norm(added, rows, norm.weight, norm.bias, epsilon)

    def in_the_product() -> Linear:
        # Of the tanh form on cuda, 4.7e-4 from erf: within the bounds of half precision, not of float32.
        return lambda rows, layer: torch._addmm_activation(layer.bias, rows, layer.weight.t(), use_gelu=True)

    trial = functools.partial(tried, runtime=runtime, tolerance=_TOLERANCE)
    add_norm = trial(
        "residual and LayerNorm in one kernel", plain.add_norm, one_kernel, lambda way: way(cast, rows, norm)
    ).better
    ffn_up = plain.ffn_up
    if gelu:
        ffn_up = trial(
            "GELU inside the matrix product", plain.ffn_up, in_the_product, lambda way: (way(cast, up),)
        ).better
    return dataclasses.replace(plain, ffn_up=ffn_up, add_norm=add_norm)
