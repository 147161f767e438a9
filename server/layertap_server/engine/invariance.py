"""Batch invariance: a text gets the same bits alone, in any batch, and with any number of CPU threads.

Matrix products sum in another order for other row counts, and some element-wise kernels compute the end of a tensor
in another way than its middle. Which counts are concerned depends on the CPU, its libraries, the shapes and the
dtype, so nothing is assumed: a probe runs one block of the model over texts alone and in batches and compares bits.
The cheapest padding of rows that makes them equal is used; where none does, the server says that it is not
batch-invariant.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import torch

from layertap_server.engine.linear import filled_up
from layertap_server.engine.packing import Group

Forward = Callable[[torch.Tensor, Sequence[Group]], torch.Tensor]
"""Runs one block over rows. Shape: [row_count, hidden_size], float32, in and out."""

_LENGTHS: Final = (*range(1, 14), 17, 31, 40, 66)
"""Tokens of the texts of the probe: most row counts that are special are small."""
_LONE_LENGTH: Final = 256
"""The longest text that a lone caller computes with a team of threads."""
_ROWWISE_COUNTS: Final = (1, 2, 3, 5, 8, 13, 40, 256)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RowPadding:
    """How many rows are computed in place of those that there are.

    Attributes:
        least: At least so many rows.
        step: A multiple of so many rows; a power of two.
    """

    least: int = 1
    step: int = 1

    def padded(self, row_count: int) -> int:
        """Returns how many rows to compute; never fewer for more rows."""
        return max(self.least, -(-row_count // self.step) * self.step)


NO_PADDING: Final = RowPadding()
_CANDIDATES: Final = (
    RowPadding(least=2),
    RowPadding(least=4),
    *(RowPadding(least=step, step=step) for step in (2, 4, 8, 16, 32, 64)),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Invariance:
    """What the probe found.

    Attributes:
        padding: The padding of rows to compute with.
        holds: Whether a text then has the same bits in any batch.
        thread_count: CPU threads of each instance: one where more do not give the same bits.
        max_thread_count: The largest team of threads, of those asked for, that gives the same bits too.
    """

    padding: RowPadding
    holds: bool
    thread_count: int
    max_thread_count: int


RunProbe = Callable[[Callable[[], Invariance]], Invariance]
"""Runs a probe, here or in another process with the same weights."""


def run_here(probe: Callable[[], Invariance]) -> Invariance:
    """Returns what a probe finds in this process."""
    return probe()


@dataclasses.dataclass(frozen=True, slots=True)
class Rowwise:
    """A part of the model beside its blocks that computes each row by itself, such as its pooler.

    Attributes:
        apply: Shape: [row_count, size], float32, to [row_count, any size].
        size: Values of a row.
    """

    apply: Callable[[torch.Tensor], torch.Tensor]
    size: int


class Probe:
    """Compares the bits of texts alone and in batches.

    Args:
        forward: Runs one block of the model.
        rowwise: The parts beside the blocks.
        hidden_size: Values a row has.
        extra: Returns how many rows to compute, for speed, in place of so many; a multiple of any step stays one.
        least_step: The least step of rows.
    """

    def __init__(
        self,
        forward: Forward,
        rowwise: Sequence[Rowwise],
        *,
        hidden_size: int,
        extra: Callable[[int], int],
        least_step: int = 1,
    ) -> None:
        self._forward, self._rowwise, self._extra = forward, rowwise, extra
        self._candidates = [one for one in _CANDIDATES if one.step >= least_step]
        generator = torch.Generator().manual_seed(0)
        # Every third text from the third on has an attention mask of its own.
        random = np.random.default_rng(0)
        lengths = [*_LENGTHS, _LONE_LENGTH]
        self._texts = [torch.randn(length, hidden_size, generator=generator) for length in lengths]
        self._masks = [
            None if n % 3 < 2 else random.integers(0, 2, length, dtype=np.int32) for n, length in enumerate(lengths)
        ]
        self._team_texts = [*range(0, len(lengths) - 1, 2), len(lengths) - 1]
        self._rows = [torch.randn(max(_ROWWISE_COUNTS), one.size, generator=generator) for one in rowwise]

    def run(self, *, thread_count: int, max_thread_count: int) -> Invariance:
        """Returns the cheapest padding that holds with `thread_count` threads or with one, and the largest team.

        Runs in a thread of its own: a thread that has computed with a team keeps the team.
        """
        with ThreadPoolExecutor(1, "probe") as own_thread:
            return own_thread.submit(self._search, thread_count, max_thread_count).result()

    @torch.inference_mode()
    def _search(self, thread_count: int, max_thread_count: int) -> Invariance:
        for count in sorted({thread_count, 1}, reverse=True):
            torch.set_num_threads(count)
            for padding in self._candidates:
                if (wanted := self._same_bits(padding)) is not None:
                    return self._with_team(padding, wanted, count, max_thread_count)
        return Invariance(padding=NO_PADDING, holds=False, thread_count=thread_count, max_thread_count=thread_count)

    def _with_team(
        self, padding: RowPadding, wanted: list[torch.Tensor], thread_count: int, max_thread_count: int
    ) -> Invariance:
        """Returns a padding that holds, with the largest team that gives the wanted bits of each text."""
        count = max_thread_count
        while count > thread_count:
            torch.set_num_threads(count)
            agrees = all(torch.equal(self._bits_alone(n, padding), wanted[n]) for n in self._team_texts)
            if agrees and self._rowwise_agree(padding):
                break
            count //= 2
        return Invariance(
            padding=padding, holds=True, thread_count=thread_count, max_thread_count=max(count, thread_count)
        )

    def _same_bits(self, padding: RowPadding) -> list[torch.Tensor] | None:
        """Returns each text's bits if they are the same alone, in a batch of all, and in one of each several times."""
        if not self._rowwise_agree(padding):
            return None
        count = len(self._texts)
        alone = [self._bits_alone(n, padding) for n in range(count)]
        for batch in (list(range(count)), [n for n in range(count - 1) for _ in range(n % 2 + 1)], [0, 4, 9]):
            if not all(torch.equal(rows, alone[n]) for n, rows in self._run(batch, padding)):
                return None
        return alone

    def _bits_alone(self, n: int, padding: RowPadding) -> torch.Tensor:
        ((_, rows),) = self._run([n], padding)
        return rows

    def _run(self, batch: Sequence[int], padding: RowPadding) -> list[tuple[int, torch.Tensor]]:
        """Runs a batch of texts that is sorted by length; returns each text with its rows."""
        groups, start = [], 0
        for n, members in itertools.groupby(batch):
            text_count, length, mask = len(list(members)), len(self._texts[n]), self._masks[n]
            groups.append(
                Group(
                    start=start,
                    text_count=text_count,
                    length=length,
                    depth=1,
                    attention_mask=None if mask is None else np.stack([mask] * text_count),
                )
            )
            start = groups[-1].end
        rows = self._forward(self._padded([self._texts[n] for n in batch], padding), groups)
        return list(zip(batch, rows[:start].split_with_sizes([len(self._texts[n]) for n in batch]), strict=True))

    def _rowwise_agree(self, padding: RowPadding) -> bool:
        for one, rows in zip(self._rowwise, self._rows, strict=True):
            results = [one.apply(self._padded([rows[:count]], padding))[:count] for count in _ROWWISE_COUNTS]
            if not all(torch.equal(found, results[-1][: len(found)]) for found in results):
                return False
        return True

    def _padded(self, parts: list[torch.Tensor], padding: RowPadding) -> torch.Tensor:
        rows = torch.cat(parts)
        return filled_up(rows, self._extra(padding.padded(len(rows))))
