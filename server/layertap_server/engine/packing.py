"""The rows of each text in a batch: packed, and sorted so that the work is done in few, large pieces.

Pure numpy. Texts are packed one after the other without padding. Those whose calls need the deepest layers come
first: after each layer, the texts that are done are a tail, which is dropped. Among those of one depth, texts of equal
length follow each other, so that attention runs over a whole group at once and needs no mask between texts.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from layertap_server.types import Pool, Run, Strategy, Text

Indices = npt.NDArray[np.int64]

_FIRST = np.zeros(1, np.int64)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """Texts of equal length, one after the other.

    Attributes:
        start: The first row.
        depth: The highest layer they are needed for.
        attention_mask: Shape: [text_count, length]. None: nothing is masked.
    """

    start: int
    text_count: int
    length: int
    depth: int
    attention_mask: npt.NDArray[np.int32] | None

    @property
    def end(self) -> int:
        """The row past the last."""
        return self.start + self.text_count * self.length


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bags:
    """The rows that each pooled vector is made of.

    Attributes:
        rows: The pooled rows, those of each vector one after the other.
        counts: Shape: [vector_count]; how many rows each vector is made of. Words may have none.
    """

    rows: Indices
    counts: Indices


class PackedBatch:
    """One batch, packed and sorted."""

    def __init__(self, runs: Sequence[Run]) -> None:
        """Sorts the texts of all runs."""
        self._runs = runs
        texts = [text for run in runs for text in run.texts]
        lengths = np.array([text.token_count for text in texts], np.int64)
        depths = np.repeat([run.plan.depth for run in runs], [len(run.texts) for run in runs])
        masked = np.array([text.attention_mask is not None for text in texts])
        order = np.lexsort((lengths, masked, -depths))
        ordered = [texts[n] for n in order]
        starts = np.zeros(len(texts), np.int64)
        starts[order] = np.concatenate([[0], np.cumsum(lengths[order])[:-1]])
        self._starts = starts
        self._kept_counts, self._kept_starts = lengths, starts
        # Whether texts are pooled from their first row to their last, unless a pool leaves some out.
        has_windows = any(text.window is not None for text in texts)
        self._are_whole = not has_windows and not masked.any()
        if has_windows:
            self._kept_counts = np.array([text.row_count for text in texts], np.int64)
            skipped = [0 if text.window is None else text.window.kept.start for text in texts]
            self._kept_starts = starts + np.array(skipped, np.int64)
        self._run_ends = np.cumsum([len(run.texts) for run in runs])
        self._depths_sorted = depths[order]
        self._row_ends = np.cumsum(lengths[order])
        self.input_ids: npt.NDArray[np.int32] = np.concatenate([text.input_ids for text in ordered])
        self._row_starts: Indices = np.repeat(starts[order], lengths[order])
        self.token_type_ids = _token_type_ids(ordered)
        self.groups = _groups(ordered, lengths[order], masked[order], self._depths_sorted)

    @property
    def bounds(self) -> npt.NDArray[np.int32]:
        """The first row of each text in its order here, and the row past the last. Shape: [text_count + 1]."""
        return np.concatenate([[0], self._row_ends], dtype=np.int32)

    @property
    def depth(self) -> int:
        """The highest layer that is needed."""
        return int(self._depths_sorted[0])

    def row_count(self, layer: int) -> int:
        """Returns how many rows, from the first, are needed at a layer."""
        text_count = int(np.searchsorted(-self._depths_sorted, -layer, side="right"))
        return int(self._row_ends[text_count - 1]) if text_count else 0

    def position_ids(self, padding_id: int | None) -> Indices:
        """Returns the position of each row. Shape: [row_count].

        Args:
            padding_id: None: positions count from 0, whatever the tokens. Else tokens of this id have the position
                `padding_id`, and the others of each text count from the one after it, as in RoBERTa.
        """
        if padding_id is None:
            return np.arange(len(self._row_starts)) - self._row_starts
        counted = self.input_ids != padding_id
        so_far = np.cumsum(counted)
        before = so_far[self._row_starts] - counted[self._row_starts]
        return np.where(counted, so_far - before, 0) + padding_id

    def texts(self, runs: Sequence[int]) -> list[Text]:
        """Returns the texts of some runs, run by run in request order."""
        return [text for run in runs for text in self._runs[run].texts]

    def first_rows(self, runs: Sequence[int]) -> Indices:
        """Returns the first row of each text of some runs, run by run in request order. Shape: [text_count]."""
        return self._starts[self._texts(runs)]

    def rows(self, runs: Sequence[int]) -> Indices:
        """Returns the rows of some runs, run by run in request order; of windows those that they give."""
        chosen = self._texts(runs)
        return _ranges(self._kept_starts[chosen], self._kept_counts[chosen])

    def bags(self, runs: Sequence[int], pool: Pool) -> Bags:
        """Returns the rows that are pooled of each text of some runs, run by run in request order.

        Of a window that gives none of them, its row 0 stands for them.
        """
        if self._are_whole and pool.takes_all:  # Of thousands of short texts the steps below are half the host's work.
            return Bags(rows=self.rows(runs), counts=self._kept_counts[self._texts(runs)])
        texts = self.texts(runs)
        taken = [pool.positions(text) for text in texts]
        if any(text.window is not None for text in texts):
            taken = [positions if len(positions) else _FIRST for positions in taken]
        counts = np.array([len(positions) for positions in taken], np.int64)
        rows = np.concatenate(taken) + np.repeat(self.first_rows(runs), counts)
        return Bags(rows=rows, counts=counts)

    def words(self, runs: Sequence[int]) -> Bags:
        """Returns the rows of each word of some runs, run by run, texts in request order."""
        words = [text.words for run in runs for text in self._runs[run].texts if text.words is not None]
        counts = np.concatenate([one.piece_counts for one in words])
        starts = np.concatenate([one.starts for one in words])
        starts += np.repeat(self.first_rows(runs), [len(one.piece_counts) for one in words])
        return Bags(rows=_ranges(starts, counts), counts=counts)

    def spans(self, runs: Sequence[int], pool: Pool) -> Bags:
        """Returns the rows that are pooled of each span of some runs, run by run, texts in request order."""
        chosen = [
            (text, text.spans, row)
            for text, row in zip(self.texts(runs), self.first_rows(runs), strict=True)
            if text.spans is not None
        ]
        none = np.zeros(0, np.int64)
        counts = np.concatenate([none, *(spans.counts for _, spans, _ in chosen)])
        rows = _ranges(np.concatenate([none, *(spans.starts + row for _, spans, row in chosen)]), counts)
        if any(text.attention_mask is not None for text, _, _ in chosen):
            kept = np.concatenate([_attended(text)[_ranges(spans.starts, spans.counts)] for text, spans, _ in chosen])
            counts = np.bincount(np.repeat(np.arange(len(counts)), counts)[kept], minlength=len(counts))
            rows = rows[kept]
        if pool.strategy is Strategy.LAST:
            rows, counts = rows[np.cumsum(counts) - 1], np.ones_like(counts)
        return Bags(rows=rows, counts=counts)

    def _texts(self, runs: Sequence[int]) -> Indices:
        """Returns the indices in the batch of the texts of some runs. Shape: [text_count]."""
        return np.concatenate(
            [np.arange(self._run_ends[run] - len(self._runs[run].texts), self._run_ends[run]) for run in runs]
        )


def _ranges(starts: Indices, lengths: Indices) -> Indices:
    """Returns start, start + 1, … for each start, one after the other."""
    ends = np.cumsum(lengths)
    ranges: Indices = np.arange(int(lengths.sum())) + np.repeat(starts - (ends - lengths), lengths)
    return ranges


def _attended(text: Text) -> npt.NDArray[np.bool_]:
    """Returns which tokens of a text may be attended to. Shape: [token_count]."""
    return np.ones(text.token_count, np.bool_) if text.attention_mask is None else text.attention_mask == 1


def _token_type_ids(ordered: Sequence[Text]) -> npt.NDArray[np.int32] | None:
    if all(text.token_type_ids is None for text in ordered):
        return None
    return np.concatenate(
        [
            np.zeros(text.token_count, np.int32) if text.token_type_ids is None else text.token_type_ids
            for text in ordered
        ]
    )


def _groups(ordered: Sequence[Text], lengths: Indices, masked: npt.NDArray[np.bool_], depths: Indices) -> list[Group]:
    keys = np.stack([lengths, masked, depths])
    cuts = [0, *(np.flatnonzero((keys[:, 1:] != keys[:, :-1]).any(axis=0)) + 1).tolist(), len(ordered)]
    groups, start = [], 0
    for first, last in itertools.pairwise(cuts):
        length = int(lengths[first])
        masks = [text.attention_mask for text in ordered[first:last] if text.attention_mask is not None]
        groups.append(
            Group(
                start=start,
                text_count=last - first,
                length=length,
                depth=int(depths[first]),
                attention_mask=np.stack(masks) if masks else None,
            )
        )
        start += (last - first) * length
    return groups
