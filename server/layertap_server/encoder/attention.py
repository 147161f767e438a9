"""Self-attention over packed rows: each text attends to itself alone.

Texts of equal length run as one group and need no mask; a text that brings its own attention mask gets it as
transformers' eager attention applies it: masked scores become the lowest finite number, so that a text whose mask is
all zeros attends to all of its positions alike. On cuda in half precision, all unmasked texts run as one
variable-length flash attention.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from layertap_server.encoder.layout import Group

log = logging.getLogger(__name__)


class Attention:
    """The attention of all blocks of one model on one device."""

    def __init__(self, *, device: torch.device, dtype: torch.dtype, head_count: int, hidden_size: int) -> None:
        """Probes for variable-length attention where it may exist."""
        self._device = device
        self._dtype = dtype
        self._head_count = head_count
        self._head_size = hidden_size // head_count
        self._varlen = self._find_varlen()

    def prepare(self, groups: Sequence[Group]) -> Prepared:
        """Brings what the groups need to the device, once for all layers."""
        steps: list[_Step] = []
        for group in groups:
            if group.attention_mask is None and self._varlen is not None:
                lengths = [group.length] * group.text_count
                if steps and steps[-1].lengths is not None and steps[-1].depth == group.depth:
                    steps[-1].extend(group.end, lengths)
                else:
                    steps.append(_Step(group.start, group.end, depth=group.depth, lengths=lengths))
            else:
                shape = group.text_count, group.length
                steps.append(_Step(group.start, group.end, depth=group.depth, shape=shape, mask=self._mask(group)))
        for step in steps:
            step.finish(self._device)
        return Prepared(self, steps)

    def run(self, step: _Step, qkv: torch.Tensor) -> torch.Tensor:
        """Attends within one step. Shape: [row_count, 3 · hidden_size] to [row_count, hidden_size]."""
        if step.bounds is not None:
            assert self._varlen is not None
            query, key, value = qkv.view(-1, 3, self._head_count, self._head_size).unbind(1)
            out: torch.Tensor = self._varlen(query, key, value, step.bounds, step.bounds, step.longest, step.longest)
            return out.reshape(len(qkv), -1)
        text_count, length = step.shape
        split = qkv.view(text_count, length, 3, self._head_count, self._head_size)
        query, key, value = (part.transpose(1, 2) for part in split.unbind(2))
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=step.mask)
        return context.transpose(1, 2).reshape(len(qkv), -1)

    def _mask(self, group: Group) -> torch.Tensor | None:
        if group.attention_mask is None:
            return None
        mask = torch.from_numpy(group.attention_mask).to(self._device)
        lowest = torch.finfo(self._dtype).min
        return torch.zeros(mask.shape, dtype=self._dtype, device=self._device).masked_fill_(mask == 0, lowest)[
            :, None, None, :
        ]

    def _find_varlen(self) -> Any:
        """Returns torch's variable-length attention if it is there and agrees with the grouped one."""
        if self._device.type != "cuda" or self._dtype is torch.float32:
            return None
        try:
            from torch.nn.attention.varlen import varlen_attn

            generator = torch.Generator(device=self._device).manual_seed(0)
            shape = 12, 3 * self._head_count * self._head_size
            qkv = torch.randn(shape, generator=generator, device=self._device).to(self._dtype)
            step = _Step(0, 12, lengths=[4, 4, 4])
            step.finish(self._device)
            self._varlen = varlen_attn
            found = self.run(step, qkv)
            wanted = self.run(_Step(0, 12, shape=(3, 4)), qkv)
            agrees = torch.allclose(found.float(), wanted.float(), atol=2e-2)
        except Exception as exc:  # It is young: it may be missing, or refuse this device or head size.
            log.info("variable-length attention is not available (%s); groups of equal length run instead", exc)
            return None
        log.info("variable-length attention: %s", "used" if agrees else "not used, its numbers differ")
        return varlen_attn if agrees else None


class _Step:
    """Rows that attend in one launch: either one shape with an optional mask, or lengths of their own."""

    __slots__ = ("bounds", "depth", "end", "lengths", "longest", "mask", "shape", "start")

    def __init__(
        self,
        start: int,
        end: int,
        *,
        depth: int = 0,
        shape: tuple[int, int] = (0, 0),
        mask: torch.Tensor | None = None,
        lengths: list[int] | None = None,
    ) -> None:
        self.start, self.end, self.depth = start, end, depth
        self.shape, self.mask, self.lengths = shape, mask, lengths
        self.bounds: torch.Tensor | None = None
        self.longest = 0

    def extend(self, end: int, lengths: list[int]) -> None:
        """Takes the texts that follow, if they are done at the same layer."""
        assert self.lengths is not None
        self.end = end
        self.lengths.extend(lengths)

    def finish(self, device: torch.device) -> None:
        if self.lengths is not None:
            self.longest = max(self.lengths)
            self.bounds = torch.from_numpy(np.cumsum([0, *self.lengths], dtype=np.int32)).to(device)


class Prepared:
    """The attention of one batch."""

    def __init__(self, attention: Attention, steps: list[_Step]) -> None:
        self._attention = attention
        self._steps = steps

    def __call__(self, qkv: torch.Tensor) -> torch.Tensor:
        """Attends within each text. Shape: [row_count, 3 · hidden_size] to [row_count, hidden_size].

        Rows may be fewer than the batch has: texts that are done are a tail, and whole groups.
        """
        steps = [step for step in self._steps if step.start < len(qkv)]
        if len(steps) == 1:
            return self._attention.run(steps[0], qkv)
        context = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        for step in steps:
            context[step.start : step.end] = self._attention.run(step, qkv[step.start : step.end])
        return context
