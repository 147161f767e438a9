"""One kernel for what stands between two matrix products: residual, LayerNorm, and the rows in half precision.

Read by torch alone these are four passes over the rows in float32; in one they cost a third, and this is most of what
an encoder block does beside multiplying. Imports triton, so only `device_steps` imports it, and only on cuda.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _add_norm(  # type: ignore[no-untyped-def]  # the types are triton's
    added, rows, weight, bias, out, cast, size, epsilon, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    within = column < size
    place = row * size + column
    values = tl.load(added + place, mask=within, other=0.0).to(tl.float32)
    values += tl.load(rows + place, mask=within, other=0.0)
    mean = tl.sum(values, axis=0) / size
    centred = tl.where(within, values - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / size
    scale = tl.load(weight + column, mask=within, other=0.0)
    shift = tl.load(bias + column, mask=within, other=0.0)
    found = centred / tl.sqrt(variance + epsilon) * scale + shift
    tl.store(out + place, found, mask=within)
    tl.store(cast + place, found.to(cast.dtype.element_ty), mask=within)


def add_norm(
    added: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds rows in any precision to rows in float32, then LayerNorm; see `device_steps.AddNorm`."""
    out, cast = torch.empty_like(rows), torch.empty_like(added)
    size = rows.shape[1]
    if len(rows):
        block = triton.next_power_of_2(size)
        warps = min(max(block // 256, 1), 8)
        _add_norm[(len(rows),)](added, rows, weight, bias, out, cast, size, epsilon, block=block, num_warps=warps)
    return out, cast
