"""One encoder block, written so that torch can compile it.

A block is two dozen small steps. Run one by one from Python, each takes its turn at the interpreter, and a lane waits
at every step for whoever has it: other lanes, and the loop that talks to the callers. Compiled, a block is one step.
Where torch cannot compile it (a later torch, an activation of its own), the same functions run as they stand.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import List, NamedTuple, Optional, Tuple, TypeVar  # noqa: UP035  # the spellings that torch compiles

import torch
from torch.nn import functional as F

from layertap_server.encoder.attention import attend
from layertap_server.encoder.linear import Dense, dense

log = logging.getLogger(__name__)

FunctionT = TypeVar("FunctionT", bound=Callable[..., torch.Tensor])


class Norm(NamedTuple):
    """The numbers of one LayerNorm. Shape of each: [hidden_size]."""

    weight: torch.Tensor
    bias: torch.Tensor


class Weights(NamedTuple):
    """The numbers of one block, under the names of BERT's parts; `qkv` is query, key and value in one."""

    qkv: Dense
    attended: Dense
    attended_norm: Norm
    intermediate: Dense
    output: Dense
    output_norm: Norm


def project(rows: torch.Tensor, weights: Weights, packed: bool) -> torch.Tensor:
    """Makes query, key and value. Shape: [row_count, hidden_size], float32, to [row_count, 3 · hidden_size]."""
    return dense(rows.to(weights.qkv.bias.dtype), weights.qkv, packed, False)


def settle(context: torch.Tensor, rows: torch.Tensor, weights: Weights, packed: bool, epsilon: float) -> torch.Tensor:
    """Brings what was attended to into the rows. Shape: [row_count, hidden_size], float32."""
    attended = dense(context, weights.attended, packed, False).float().add_(rows)
    return F.layer_norm(attended, [rows.size(1)], weights.attended_norm.weight, weights.attended_norm.bias, epsilon)


def widen(rows: torch.Tensor, weights: Weights, packed: bool, gelu: bool) -> torch.Tensor:
    """Makes the intermediate values, GELU applied if asked. Shape: [row_count, intermediate_size]."""
    return dense(rows.to(weights.qkv.bias.dtype), weights.intermediate, packed, gelu)


def narrow(wide: torch.Tensor, rows: torch.Tensor, weights: Weights, packed: bool, epsilon: float) -> torch.Tensor:
    """Brings the intermediate values into the rows. Shape: [row_count, hidden_size], float32."""
    output = dense(wide, weights.output, packed, False).float().add_(rows)
    return F.layer_norm(output, [rows.size(1)], weights.output_norm.weight, weights.output_norm.bias, epsilon)


def block(
    rows: torch.Tensor,
    weights: Weights,
    shapes: List[Tuple[int, int, int]],  # noqa: UP006
    masks: List[Optional[torch.Tensor]],  # noqa: UP006, UP045
    head_count: int,
    packed: bool,
    epsilon: float,
) -> torch.Tensor:
    """Runs a whole block with GELU. Shape: [row_count, hidden_size], float32, in and out."""
    context = attend(project(rows, weights, packed), shapes, masks, head_count)
    rows = settle(context, rows, weights, packed, epsilon)
    return narrow(widen(rows, weights, packed, True), rows, weights, packed, epsilon)


def compiled(function: FunctionT) -> FunctionT:
    """Returns a function as torch's own program, or as it is where torch cannot."""
    try:
        with warnings.catch_warnings():
            # torch calls this old, but offers nothing else that needs neither a C++ compiler nor fixed shapes.
            warnings.simplefilter("ignore")
            program: FunctionT = torch.jit.script(function)
    except Exception as exc:
        log.info("torch %s does not compile the encoder block (%s); it runs step by step", torch.__version__, exc)
        return function
    return program
