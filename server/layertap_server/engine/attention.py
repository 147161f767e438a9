"""Self-attention over packed rows: each text attends to itself alone.

Texts of equal length run as one group and need no mask; a text that brings its own attention mask gets it as
transformers' eager attention applies it: masked scores become the lowest finite number, so that a text whose mask is
all zeros attends to all of its positions alike. On cuda in half precision, all unmasked texts run as one
variable-length flash attention.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, List, Optional, Tuple  # noqa: UP035  # the spellings that torch compiles

import numpy as np
import torch
from torch.nn import functional as F

from layertap_server.engine.packing import Group

log = logging.getLogger(__name__)


def attend(
    qkv: torch.Tensor,
    shapes: List[Tuple[int, int, int]],  # noqa: UP006
    masks: List[Optional[torch.Tensor]],  # noqa: UP006, UP045
    head_count: int,
) -> torch.Tensor:
    """Attends within each text, group by group; written so that torch can compile it.

    Args:
        qkv: Query, key and value of each row. Shape: [row_count, 3 · hidden_size]. Rows may be fewer than the groups
            have: texts that are done are a tail, and whole groups. Rows behind the groups are padding.
        shapes: First row, text count and length of each group.
        masks: For each group what is added to its scores, or None. Shape: [text_count, 1, 1, length].
        head_count: Attention heads.

    Returns:
        Shape: [row_count, hidden_size]. Rows behind the groups are 0, others of no group hold nothing.
    """
    row_count, hidden_size = qkv.size(0), qkv.size(1) // 3
    context = torch.empty([row_count, hidden_size], dtype=qkv.dtype, device=qkv.device)
    covered = 0
    for (start, text_count, length), mask in zip(shapes, masks):  # noqa: B905  # torch knows no `strict`
        end = start + text_count * length
        if end <= row_count:
            split = qkv[start:end].view(text_count, length, 3, head_count, hidden_size // head_count)
            query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
            found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            found = found.transpose(1, 2).reshape(end - start, hidden_size)
            if end - start == row_count:
                return found
            context[start:end] = found
            covered = end
    if covered < row_count:
        context[covered:].zero_()  # What lies in new memory could be numbers that are slow to compute with.
    return context


@dataclasses.dataclass(slots=True)
class _Varied:
    """Texts of many lengths that attend in one launch: their rows, and the highest layer they are needed for."""

    start: int
    end: int
    depth: int
    lengths: list[int]
    bounds: torch.Tensor


class Attention:
    """The attention of all blocks of one model on one device.

    Attributes:
        head_count: Attention heads.
        varies: Whether texts of many lengths attend in one launch; else groups are all there is.
    """

    def __init__(self, *, device: torch.device, dtype: torch.dtype, head_count: int, hidden_size: int) -> None:
        """Probes for variable-length attention where it may exist."""
        self._device = device
        self._dtype = dtype
        self.head_count = head_count
        self._head_size = hidden_size // head_count
        self._varlen = self._find_varlen()
        self.varies = self._varlen is not None

    def prepare(self, groups: Sequence[Group]) -> Prepared:
        """Brings what the groups need to the device, once for all layers."""
        varied: list[_Varied] = []
        alike: list[Group] = []
        for group in groups:
            if group.attention_mask is not None or not self.varies:
                alike.append(group)
                continue
            lengths = [group.length] * group.text_count
            if varied and varied[-1].end == group.start and varied[-1].depth == group.depth:
                varied[-1].end = group.end
                varied[-1].lengths.extend(lengths)
            else:
                varied.append(_Varied(group.start, group.end, group.depth, lengths, torch.empty(0)))
        for one in varied:
            one.bounds = self._bounds(one.lengths)
        return Prepared(
            self,
            shapes=[(group.start, group.text_count, group.length) for group in alike],
            masks=[self._mask(group) for group in alike],
            varied=varied,
        )

    def run_varied(self, qkv: torch.Tensor, bounds: torch.Tensor, longest: int) -> torch.Tensor:
        """Attends within texts of many lengths. Shape: [row_count, 3 · hidden_size] to [row_count, hidden_size]."""
        assert self._varlen is not None
        query, key, value = qkv.view(-1, 3, self.head_count, self._head_size).unbind(1)
        out: torch.Tensor = self._varlen(query, key, value, bounds, bounds, longest, longest)
        return out.reshape(len(qkv), -1)

    def _bounds(self, lengths: list[int]) -> torch.Tensor:
        return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)).to(self._device)

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
            shape = 12, 3 * self.head_count * self._head_size
            qkv = torch.randn(shape, generator=generator, device=self._device).to(self._dtype)
            self._varlen = varlen_attn
            found = self.run_varied(qkv, self._bounds([4, 4, 4]), 4)
            wanted = attend(qkv, [(0, 3, 4)], [None], self.head_count)
            agrees = torch.allclose(found.float(), wanted.float(), atol=2e-2)
        except Exception as exc:  # It is young: it may be missing, or refuse this device or head size.
            log.info("variable-length attention is not available (%s); groups of equal length run instead", exc)
            return None
        log.info("variable-length attention: %s", "used" if agrees else "not used, its numbers differ")
        return varlen_attn if agrees else None


class Prepared:
    """The attention of one batch.

    Attributes:
        shapes: First row, text count and length of each group that attends by itself.
        masks: What is added to the scores of each, or None.
    """

    def __init__(
        self,
        attention: Attention,
        *,
        shapes: list[tuple[int, int, int]],
        masks: list[torch.Tensor | None],
        varied: list[_Varied],
    ) -> None:
        self.shapes, self.masks = shapes, masks
        self._attention = attention
        self._varied = varied

    def __call__(self, qkv: torch.Tensor) -> torch.Tensor:
        """Attends within each text; see `attend`."""
        row_count = len(qkv)
        varied = [one for one in self._varied if one.end <= row_count]
        if len(varied) == 1 and varied[0].end - varied[0].start == row_count:
            return self._attention.run_varied(qkv, varied[0].bounds, max(varied[0].lengths))
        context = attend(qkv, self.shapes, self.masks, self._attention.head_count)
        for one in varied:
            rows = slice(one.start, one.end)
            context[rows] = self._attention.run_varied(qkv[rows], one.bounds, max(one.lengths))
        return context
