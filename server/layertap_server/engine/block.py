"""Encoder blocks, written so that torch can compile them.

A block is two dozen small steps. Run one by one from Python, each needs the interpreter's lock, and an instance waits
at every step for the threads that hold it: other instances and the event loop. Compiled, all blocks up to the next
wanted layer are one step. Only the program holds the weights: references to tensors that Python knows too are counted
with the interpreter's lock held.

Where torch cannot compile them (a later torch), and with another activation than GELU, `block_stack` runs the same
steps one by one. Torch reads the annotations here, so they are objects and not strings.
"""

import logging
import warnings
from typing import List, NamedTuple, Optional, Tuple  # noqa: UP035  # the spellings that torch compiles

import torch
from torch.nn import functional as F

from layertap_server.engine.attention import attend
from layertap_server.engine.linear import Dense, dense

log = logging.getLogger(__name__)


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


def add_norm(added: torch.Tensor, rows: torch.Tensor, norm: Norm, epsilon: float) -> torch.Tensor:
    """Adds what a product gave to the rows, then LayerNorm. Shape: [row_count, hidden_size], float32."""
    return F.layer_norm(added.float().add_(rows), [rows.size(1)], norm.weight, norm.bias, epsilon)


class Blocks(torch.nn.Module):
    """All blocks of a model whose activation is GELU, and how they run."""

    blocks: List[Weights]  # noqa: UP006

    def __init__(self, blocks: List[Weights], *, head_count: int, packed: bool, epsilon: float) -> None:  # noqa: UP006
        super().__init__()
        self.blocks = blocks
        self.head_count = head_count
        self.packed = packed
        self.epsilon = epsilon

    @torch.jit.export
    def project(self, rows: torch.Tensor, block: int) -> torch.Tensor:
        """Makes query, key and value of one block. Shape: [row_count, hidden_size] to [row_count, 3 · hidden_size]."""
        qkv = self.blocks[block].qkv
        return dense(rows.to(qkv.bias.dtype), qkv, self.packed, False)

    def forward(
        self,
        rows: torch.Tensor,
        first: int,
        last: int,
        shapes: List[Tuple[int, int, int]],  # noqa: UP006
        masks: List[Optional[torch.Tensor]],  # noqa: UP006, UP045
    ) -> torch.Tensor:
        """Runs some blocks one after the other; `last` is the one past them.

        Shape: [row_count, hidden_size], float32, in and out. `shapes` and `masks` are those of `attend`.
        """
        for weights in self.blocks[first:last]:
            dtype = weights.qkv.bias.dtype
            qkv = dense(rows.to(dtype), weights.qkv, self.packed, False)
            context = attend(qkv, shapes, masks, self.head_count)
            attended = dense(context, weights.attended, self.packed, False)
            rows = add_norm(attended, rows, weights.attended_norm, self.epsilon)
            wide = dense(rows.to(dtype), weights.intermediate, self.packed, True)
            rows = add_norm(dense(wide, weights.output, self.packed, False), rows, weights.output_norm, self.epsilon)
        return rows


def compiled(blocks: Blocks) -> Optional[torch.jit.ScriptModule]:  # noqa: UP045
    """Returns blocks as torch's own program, which holds the weights; None where torch cannot compile them."""
    try:
        with warnings.catch_warnings():
            # torch calls this old, but offers nothing else that needs neither a C++ compiler nor fixed shapes.
            warnings.simplefilter("ignore")
            return torch.jit.script(blocks)
    except Exception as exc:
        log.info("torch %s does not compile the encoder blocks (%s); they run step by step", torch.__version__, exc)
        return None
