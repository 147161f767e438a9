"""Self-attention over packed rows on the CPU: each text attends to itself alone.

Texts of equal length run as one group and need no mask; a text that brings its own attention mask gets it as
transformers' eager attention applies it: masked scores become the lowest finite number, so that a text whose mask is
all zeros attends to all of its positions alike. `device_attention` is the same for accelerators.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import List, Optional, Tuple  # noqa: UP035  # the spellings that torch compiles

import torch
from torch.nn import functional as F

from layertap_server.engine.packing import Group
from layertap_server.engine.upload import Upload


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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CpuPrepared:
    """The attention of one batch: what `attend` needs beside the rows."""

    shapes: list[tuple[int, int, int]]
    masks: list[torch.Tensor | None]
    head_count: int

    def __call__(self, qkv: torch.Tensor) -> torch.Tensor:
        """Attends within each text; see `attend`."""
        return attend(qkv, self.shapes, self.masks, self.head_count)


class CpuAttention:
    """The attention of all blocks of one model on the CPU."""

    def __init__(self, *, dtype: torch.dtype, head_count: int) -> None:
        self._lowest = torch.finfo(dtype).min
        self._dtype = dtype
        self._head_count = head_count

    def prepare(self, groups: Sequence[Group], upload: Upload) -> CpuPrepared:
        """Makes the masks that the groups need, once for all layers."""
        return CpuPrepared(
            shapes=[(group.start, group.text_count, group.length) for group in groups],
            masks=[self._mask(group, upload) for group in groups],
            head_count=self._head_count,
        )

    def _mask(self, group: Group, upload: Upload) -> torch.Tensor | None:
        if group.attention_mask is None:
            return None
        mask = upload.add(group.attention_mask).tensor
        return torch.zeros(mask.shape, dtype=self._dtype).masked_fill_(mask == 0, self._lowest)[:, None, None, :]
