"""The encoder blocks of a model on its device, one after the other: as one compiled program, or step by step.

The residual stream and LayerNorm are float32 whatever the compute dtype: that costs little and keeps a third of the
error of doing all in bfloat16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final, TypeAlias

import torch
from torch.nn import functional as F
from transformers.activations import ACT2FN

from layertap_server.engine.attention import CpuPrepared
from layertap_server.engine.block import Blocks, Weights, compiled
from layertap_server.engine.device_steps import Steps, device_steps, plain_steps
from layertap_server.engine.linear import dense
from layertap_server.engine.runtime import Runtime
from layertap_server.engine.weight_reader import WeightReader
from layertap_server.model.files import CheckpointError

Activation: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
Attention: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""Attends within each text. Shape: [row_count, 3 · hidden_size] to [row_count, hidden_size]."""

_STEP_WORK: Final = 2e9
"""Operations of matrix products between two pauses of a batch on the CPU, unless a single block has more: 25 ms of one
core with AVX-512. Each step has to wait for the interpreter's lock, and costs up to 0.2 ms more."""


class BlockStack:
    """The blocks of one model.

    Attributes:
        has_gelu: Whether their activation is GELU, which some products apply on the way.
    """

    def __init__(self, reader: WeightReader, runtime: Runtime | None) -> None:
        """Reads the weights.

        Raises:
            CheckpointError: if a weight is missing or has another shape, or the activation is unknown.
        """
        settings = reader.settings
        activation = _activation(settings.hidden_act)
        packed = reader.linears.packed
        self.has_gelu = activation is F.gelu
        self._dtype = reader.linears.dtype
        self._runtime = runtime
        self._row_work = 4.0 * settings.hidden_size * (2 * settings.hidden_size + settings.intermediate_size)
        self._count = settings.num_hidden_layers
        self._blocks = [_weights(reader, index) for index in range(self._count)]
        self._steps = self._find_steps(activation, packed, settings.layer_norm_eps)
        self._program: torch.jit.ScriptModule | None = None
        if runtime is None and self.has_gelu:  # On an accelerator the host only queues the steps.
            heads, epsilon = settings.num_attention_heads, settings.layer_norm_eps
            self._program = compiled(Blocks(self._blocks, head_count=heads, packed=packed, epsilon=epsilon))
        if self._program is not None:
            self._blocks = []

    def run(
        self, first: int, last: int, rows: torch.Tensor, attention: Attention, cast: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Runs the blocks from `first` to before `last`. Shape: [row_count, hidden_size], float32, in and out.

        Returns also the rows in the compute dtype, if it has them, to be given back with the rows for the next blocks.
        """
        if self._program is not None:
            assert isinstance(attention, CpuPrepared)
            found: torch.Tensor = self._program(rows, first, last, attention.shapes, attention.masks)
            return found, None
        steps, cast = self._steps, rows.to(self._dtype) if cast is None else cast
        for block in self._blocks[first:last]:
            context = attention(steps.linear(cast, block.qkv))
            rows, cast = steps.add_norm(steps.linear(context, block.attended), rows, block.attended_norm)
            output = steps.linear(steps.ffn_up(cast, block.intermediate), block.output)
            rows, cast = steps.add_norm(output, rows, block.output_norm)
        return rows, cast

    def project(self, rows: torch.Tensor, block: int) -> torch.Tensor:
        """Makes query, key and value of one block. Shape: [row_count, hidden_size] to [row_count, 3 · hidden_size]."""
        if self._program is not None:
            projected: torch.Tensor = self._program.project(rows, block)
            return projected
        return self._steps.linear(rows.to(self._dtype), self._blocks[block].qkv)

    def count_at_once(self, row_count: int, longest: int) -> int:
        """Returns how many blocks run over so many rows before a batch may pause.

        No call is short beside texts that are: a batch of those only looks whether its callers are still there. So it
        matters how many rows the longest text has.
        """
        if self._runtime is not None:
            return self._count
        is_long = self._row_work * longest * self._count > _STEP_WORK
        return max(1, int((_STEP_WORK if is_long else 4 * _STEP_WORK) / (self._row_work * row_count)))

    def _find_steps(self, activation: Activation, packed: bool, epsilon: float) -> Steps:
        """Returns how blocks run that are not compiled."""
        plain = plain_steps(lambda rows, layer: dense(rows, layer, packed, False), activation, epsilon)
        if self._runtime is None:
            ffn_up = (lambda rows, layer: dense(rows, layer, packed, True)) if self.has_gelu else plain.ffn_up
            return dataclasses.replace(plain, ffn_up=ffn_up)
        if self._dtype is torch.float32 or not self._blocks:
            return plain
        return device_steps(
            plain,
            gelu=self.has_gelu,
            epsilon=epsilon,
            norm=self._blocks[0].output_norm,
            up=self._blocks[0].intermediate,
            runtime=self._runtime,
        )


def _weights(reader: WeightReader, index: int) -> Weights:
    prefix = f"encoder.layer.{index}"
    hidden, intermediate = reader.settings.hidden_size, reader.settings.intermediate_size
    names = [f"{prefix}.attention.self.{part}" for part in ("query", "key", "value")]
    return Weights(
        qkv=reader.linear(*names, out_size=hidden, in_size=hidden),
        attended=reader.linear(f"{prefix}.attention.output.dense", out_size=hidden, in_size=hidden),
        attended_norm=reader.norm(f"{prefix}.attention.output", hidden),
        intermediate=reader.linear(f"{prefix}.intermediate.dense", out_size=intermediate, in_size=hidden),
        output=reader.linear(f"{prefix}.output.dense", out_size=hidden, in_size=intermediate),
        output_norm=reader.norm(f"{prefix}.output", hidden),
    )


def _activation(name: str) -> Activation:
    if name == "gelu":
        return F.gelu
    if name not in ACT2FN:
        raise CheckpointError(f"config.json says hidden_act {name!r}, which transformers does not know")
    activation: Activation = ACT2FN[name]
    return activation
