"""Self-attention on an accelerator: few launches a layer, whatever the lengths of the texts.

Two ways, both over rows that lie one text after the other:

- *Padded*: texts whose lengths round up to the same power of two run as one batch, with a mask over the padding. It is
  exact for any attention mask, and a text's bits do not depend on what else is in the batch. Each launch serves one
  such length.
- *Variable-length* flash attention, in half precision and without masks: texts of up to a tile of its kernel in one
  launch, longer ones in another; together, one long text would make the kernel start empty blocks for all the others.

Which lengths go which way is found by trial at start; see `fast_path`. Graphs need the second way, if it is right,
whatever its speed: its launches are the same for any lengths.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np
import torch
from torch.nn import functional as F

from layertap_server.engine.fast_path import Trial, tried
from layertap_server.engine.packing import Group
from layertap_server.engine.runtime import Runtime, VarlenAttention
from layertap_server.engine.upload import Sent, Upload

TILE: Final = 128
"""Rows that one block of the flash kernel works on."""
_LEAST_PADDED: Final = 8
_ANY_LENGTH: Final = 1 << 31
_TRIAL_LENGTHS: Final = (512, TILE, 64, 32, 16, 8)
_TRIAL_VALUES: Final = 1 << 20
_TOLERANCE: Final = 2e-2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Launch:
    """Texts that lie one after the other and attend together.

    Attributes:
        start: Their first row.
        end: The row past their last.
        run: Attends within each. Shape: [end - start, 3 · hidden_size] to [end - start, hidden_size].
    """

    start: int
    end: int
    run: Callable[[torch.Tensor], torch.Tensor]


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

    def prepare(self, groups: Sequence[Group], upload: Upload) -> DevicePrepared:
        """Adds what the groups need to the upload, once for all layers."""
        launches = []
        for _, members in itertools.groupby(groups, self._way):
            alike = list(members)
            lengths = [group.length for group in alike for _ in range(group.text_count)]
            run: Callable[[torch.Tensor], torch.Tensor]
            if self._runs_padded(alike[0]):
                run = self._padded(alike, np.array(lengths), upload)
            else:
                assert self.varlen is not None
                run = self._varied(self.varlen, lengths, upload)
            launches.append(_Launch(start=alike[0].start, end=alike[-1].end, run=run))
        return DevicePrepared(launches)

    def run_varlen(self, qkv: torch.Tensor, bounds: torch.Tensor, longest: int) -> torch.Tensor:
        """Attends within texts of many lengths.

        Args:
            qkv: Shape: [row_count, 3 · hidden_size].
            bounds: The first row of each text, and the row past the last. Shape: [text_count + 1], int32.
            longest: No text has more rows.

        Returns:
            Shape: [row_count, hidden_size].
        """
        assert self.varlen is not None
        return self._flash(self.varlen, qkv, bounds, longest)

    def _runs_padded(self, group: Group) -> bool:
        return group.attention_mask is not None or group.length <= self._padded_up_to

    def _way(self, group: Group) -> tuple[int, int]:
        """Returns what groups of one launch have in common."""
        padded = self._runs_padded(group)
        return group.depth, _padded_length(group.length) if padded else -1 - (group.length > TILE)

    def _padded(self, groups: Iterable[Group], lengths: np.ndarray, upload: Upload) -> _Padded:
        """Returns the launch of texts that run as a batch of equal lengths."""
        width = _padded_length(int(lengths.max()))
        columns = np.arange(width)
        within = columns < lengths[:, None]
        attended, alive = within.copy(), np.ones(len(lengths), np.int32)
        first = 0
        for group in groups:
            texts = slice(first, first + group.text_count)
            if group.attention_mask is not None:
                alive[texts] = group.attention_mask.any(axis=1)
                attended[texts, : group.length] = (group.attention_mask != 0) | (alive[texts, None] == 0)
            first += group.text_count
        # Places of the padding read the text's first row: any finite one will do.
        starts = np.cumsum(lengths) - lengths
        rows = starts[:, None] + np.where(within, columns, 0)
        return _Padded(
            rows=upload.add(rows.reshape(-1).astype(np.int32)),
            places=upload.add(np.flatnonzero(within).astype(np.int32)),
            attended=None if attended.all() else upload.add(attended.reshape(-1).astype(np.int32)),
            alive=None if alive.all() else upload.add(alive),
            added=self._added,
            text_count=len(lengths),
            width=width,
            head_count=self._head_count,
        )

    def _varied(
        self, varlen: VarlenAttention, lengths: Sequence[int], upload: Upload
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        bounds, longest = upload.add(np.cumsum([0, *lengths], dtype=np.int32)), max(lengths)
        return lambda qkv: self._flash(varlen, qkv, bounds.tensor, longest)

    def _flash(self, varlen: VarlenAttention, qkv: torch.Tensor, bounds: torch.Tensor, longest: int) -> torch.Tensor:
        query, key, value = qkv.view(-1, 3, self._head_count, self._head_size).unbind(1)
        return varlen(query, key, value, bounds, longest).reshape(len(qkv), -1)

    def _try(self, runtime: Runtime, varlen: VarlenAttention, dtype: torch.dtype) -> None:
        """Compares the two ways at some lengths: from the longest that runs better padded, all texts do."""
        for length in _TRIAL_LENGTHS:
            found = self._trial(runtime, varlen, dtype, length)
            if found.way is None:
                self.varlen, self._padded_up_to = None, _ANY_LENGTH
                return
            self.varlen = varlen
            self._padded_up_to = length if length < _TRIAL_LENGTHS[0] else _ANY_LENGTH
            if not found.is_faster:
                return
        self._padded_up_to = 0

    def _trial(
        self, runtime: Runtime, varlen: VarlenAttention, dtype: torch.dtype, length: int
    ) -> Trial[Callable[[torch.Tensor], torch.Tensor]]:
        """Runs texts of up to a length, from half of it on, padded and in one variable-length launch."""
        lengths = np.resize([length, length - 1, length // 2 + 1], max(3, runtime.trial_rows // length))
        row_count, width = int(lengths.sum()), 3 * self._head_count * self._head_size
        some = torch.randn(-(-_TRIAL_VALUES // width), width, generator=torch.Generator().manual_seed(0))
        qkv = some.to(runtime.device, dtype).repeat(-(-row_count // len(some)), 1)[:row_count]
        upload = Upload(runtime)
        padded: Callable[[torch.Tensor], torch.Tensor] = self._padded((), lengths, upload)
        varied = self._varied(varlen, lengths.tolist(), upload)
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Padded:
    """A batch of texts filled up to one length.

    Attributes:
        rows: The row at each place of the batch. Shape: [text_count · width].
        places: The place of each row. Shape: [row_count].
        attended: Which places are attended to, 0 or 1. Shape: [text_count · width]. None: all are.
        alive: 0 for texts whose attention mask is all zeros. Shape: [text_count]. None: there is none. Transformers'
            eager attention masks by adding the lowest number to a score, so such a text attends to all of its
            positions alike, as it does with queries of zeros.
        added: What is added to the scores by `attended`. Shape: [2].
        text_count: How many texts.
        width: Places of each text.
        head_count: Attention heads.
    """

    rows: Sent
    places: Sent
    attended: Sent | None
    alive: Sent | None
    added: torch.Tensor
    text_count: int
    width: int
    head_count: int

    def __call__(self, qkv: torch.Tensor) -> torch.Tensor:
        """Attends within each text. Shape: [row_count, 3 · hidden_size] to [row_count, hidden_size]."""
        batch = qkv.index_select(0, self.rows.tensor).view(self.text_count, self.width, 3, self.head_count, -1)
        query, key, value = batch.permute(2, 0, 3, 1, 4).unbind(0)
        mask = None
        if self.alive is not None:
            query = query * self.alive.tensor.to(query.dtype).view(-1, 1, 1, 1)
        if self.attended is not None:
            mask = self.added.index_select(0, self.attended.tensor).view(self.text_count, 1, 1, self.width)
            # Kernels want a row of the mask for each query; these are views of one.
            mask = mask.expand(-1, self.head_count, self.width, -1)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        flat = found.transpose(1, 2).reshape(self.text_count * self.width, -1)
        return flat.index_select(0, self.places.tensor)


def _padded_length(length: int) -> int:
    return max(_LEAST_PADDED, 1 << (length - 1).bit_length())


class DevicePrepared:
    """The attention of one batch."""

    def __init__(self, launches: Sequence[_Launch]) -> None:
        self._launches = launches

    def __call__(self, qkv: torch.Tensor) -> torch.Tensor:
        """Attends within each text.

        Args:
            qkv: Query, key and value of each row. Shape: [row_count, 3 · hidden_size]. Rows may be fewer than the
                batch has: texts that are done are a tail, and whole launches.

        Returns:
            Shape: [row_count, hidden_size].
        """
        found = [one.run(qkv[one.start : one.end]) for one in self._launches if one.end <= len(qkv)]
        return found[0] if len(found) == 1 else torch.cat(found)
