"""Self-attention on an accelerator: few launches a layer, whatever the lengths of the texts.

Two ways, both over rows that lie one text after the other:

- *Padded*: texts whose lengths round up to the same power of two run as one batch, with a mask over the padding. It is
  exact for any attention mask. Each launch serves one such length; where nothing is padded torch takes another kernel,
  so a text's bits may depend on what else is in the batch.
- *Variable-length* flash attention, in half precision and without masks: texts of up to a tile of its kernel in one
  launch, longer ones in another; together, one long text would make the kernel start empty blocks for all the others.

Which lengths go which way is found by trial at start; see `fast_path`. Graphs need the second way, if it is right,
whatever its speed: its launches are the same for any lengths.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np
import torch
from torch.nn import functional as F

from layertap_server.engine.fast_path import Trial, tried
from layertap_server.engine.packing import Group
from layertap_server.engine.runtime import Runtime, VarlenAttention
from layertap_server.engine.upload import Upload

Attend = Callable[[torch.Tensor], torch.Tensor]
"""Attends within each of some texts. Shape: [row_count, 3 · hidden_size] to [row_count, hidden_size]."""

TILE: Final = 128
"""Rows that one block of the flash kernel works on."""
_LEAST_PADDED: Final = 8
_ANY_LENGTH: Final = 1 << 31
_TRIAL_LENGTHS: Final = (512, TILE, 64, 32, 16, 8)
_TRIAL_VALUES: Final = 1 << 20
_TOLERANCE: Final = 2e-2


class DeviceAttention:
    """The attention of all blocks of one model on one accelerator.

    Attributes:
        varlen: The variable-length attention, if the trial found it right. None: all texts run padded.
    """

    def __init__(self, runtime: Runtime, *, dtype: torch.dtype, head_count: int, hidden_size: int) -> None:
        """Finds by trial which lengths run which way."""
        self._head_count, self._head_size = head_count, hidden_size // head_count
        # What is added to the score of a position that takes no part, and of one that does.
        self._added = torch.tensor([-torch.inf, 0.0], dtype=dtype, device=runtime.device)
        self.varlen: VarlenAttention | None = None
        self._padded_up_to = _ANY_LENGTH
        if dtype is not torch.float32 and runtime.varlen_attention is not None:
            self._try(runtime, runtime.varlen_attention, dtype)

    def prepare(self, groups: Sequence[Group], upload: Upload) -> Attend:
        """Adds what the groups need to the upload, once for all layers; returns what attends within each text.

        It may be given fewer rows than the groups have: texts that are done are a tail, and whole launches.
        """
        launches: list[tuple[slice, Attend]] = []
        for _, members in itertools.groupby(groups, self._way):
            alike = list(members)
            lengths = np.repeat([group.length for group in alike], [group.text_count for group in alike])
            if self._runs_padded(alike[0]):
                run = self._padded(alike, lengths, upload)
            else:
                assert self.varlen is not None
                run = self._varied(self.varlen, lengths, upload)
            launches.append((slice(alike[0].start, alike[-1].end), run))

        def attend(qkv: torch.Tensor) -> torch.Tensor:
            found = [run(qkv[rows]) for rows, run in launches if rows.stop <= len(qkv)]
            return found[0] if len(found) == 1 else torch.cat(found)

        return attend

    def run_varlen(self, qkv: torch.Tensor, bounds: torch.Tensor, longest: int) -> torch.Tensor:
        """Attends within texts of many lengths; bounds and longest are those of `VarlenAttention`.

        Shape: [row_count, 3 · hidden_size] to [row_count, hidden_size].
        """
        assert self.varlen is not None
        return self._flash(self.varlen, qkv, bounds, longest)

    def _runs_padded(self, group: Group) -> bool:
        return group.attention_mask is not None or group.length <= self._padded_up_to

    def _way(self, group: Group) -> tuple[int, int]:
        """Returns what groups of one launch have in common."""
        padded = self._runs_padded(group)
        return group.depth, _padded_length(group.length) if padded else -1 - (group.length > TILE)

    def _padded(self, groups: Iterable[Group], lengths: np.ndarray, upload: Upload) -> Attend:
        """Returns the launch of texts that run as a batch, filled up to one length."""
        text_count, width = len(lengths), _padded_length(int(lengths.max()))
        columns = np.arange(width)
        within = columns < lengths[:, None]
        # Transformers' eager attention masks by adding the lowest number to a score, so a text whose attention mask is
        # all zeros attends to all of its positions alike, as it does with queries of zeros.
        attended, alive = within.copy(), np.ones(text_count, np.int32)
        first = 0
        for group in groups:
            texts = slice(first, first + group.text_count)
            if group.attention_mask is not None:
                alive[texts] = group.attention_mask.any(axis=1)
                attended[texts, : group.length] = (group.attention_mask != 0) | (alive[texts, None] == 0)
            first += group.text_count
        # Places of the padding read the text's first row: any finite one will do.
        rows = (np.cumsum(lengths) - lengths)[:, None] + np.where(within, columns, 0)
        row_at = upload.add(rows.reshape(-1).astype(np.int32))
        place_of = upload.add(np.flatnonzero(within).astype(np.int32))
        taken = None if attended.all() else upload.add(attended.reshape(-1).astype(np.int32))
        scale = None if alive.all() else upload.add(alive)

        def attend(qkv: torch.Tensor) -> torch.Tensor:
            batch = qkv.index_select(0, row_at.tensor).view(text_count, width, 3, self._head_count, -1)
            query, key, value = batch.permute(2, 0, 3, 1, 4).unbind(0)
            mask = None
            if scale is not None:
                query = query * scale.tensor.to(query.dtype).view(-1, 1, 1, 1)
            if taken is not None:
                mask = self._added.index_select(0, taken.tensor).view(text_count, 1, 1, width)
                # Kernels want a row of the mask for each query; these are views of one.
                mask = mask.expand(-1, self._head_count, width, -1)
            found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            return found.transpose(1, 2).reshape(text_count * width, -1).index_select(0, place_of.tensor)

        return attend

    def _varied(self, varlen: VarlenAttention, lengths: np.ndarray, upload: Upload) -> Attend:
        bounds, longest = upload.add(np.cumsum([0, *lengths], dtype=np.int32)), int(lengths.max())
        return lambda qkv: self._flash(varlen, qkv, bounds.tensor, longest)

    def _flash(self, varlen: VarlenAttention, qkv: torch.Tensor, bounds: torch.Tensor, longest: int) -> torch.Tensor:
        query, key, value = qkv.view(-1, 3, self._head_count, self._head_size).unbind(1)
        return varlen(query, key, value, bounds, longest).reshape(len(qkv), -1)

    def _try(self, runtime: Runtime, varlen: VarlenAttention, dtype: torch.dtype) -> None:
        """Compares the two ways at some lengths: from the longest that runs better padded, all texts do."""
        for length in _TRIAL_LENGTHS:
            found = self._trial(runtime, varlen, dtype, length)
            if not found.is_right:
                self.varlen, self._padded_up_to = None, _ANY_LENGTH
                return
            self.varlen = varlen
            self._padded_up_to = length if length < _TRIAL_LENGTHS[0] else _ANY_LENGTH
            if not found.is_faster:
                return
        self._padded_up_to = 0

    def _trial(self, runtime: Runtime, varlen: VarlenAttention, dtype: torch.dtype, length: int) -> Trial[Attend]:
        """Runs texts of up to a length, from half of it on, padded and in one variable-length launch."""
        lengths = np.resize([length, length - 1, length // 2 + 1], max(3, runtime.trial_rows // length))
        row_count, width = int(lengths.sum()), 3 * self._head_count * self._head_size
        some = torch.randn(-(-_TRIAL_VALUES // width), width, generator=torch.Generator().manual_seed(0))
        qkv = some.to(runtime.device, dtype).repeat(-(-row_count // len(some)), 1)[:row_count]
        upload = Upload(runtime)
        padded, varied = self._padded((), lengths, upload), self._varied(varlen, lengths, upload)
        upload.send()
        found = tried(
            f"variable-length attention of texts of up to {length} tokens",
            padded,
            lambda: varied,
            lambda way: (way(qkv),),
            runtime=runtime,
            tolerance=_TOLERANCE,
        )
        upload.wait()
        return found


def _padded_length(length: int) -> int:
    return max(_LEAST_PADDED, 1 << (length - 1).bit_length())
