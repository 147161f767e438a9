"""Token rows into one vector a text or a word, in float32 on the device."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from layertap_server.engine.packing import Bags
from layertap_server.types import Pool, Strategy, WordPooling


def pool_rows(rows: torch.Tensor, bags: Bags, pool: Pool, size: int) -> torch.Tensor:
    """Pools the rows of each bag, cuts to `size`, then normalizes.

    Args:
        rows: Shape: [row_count, hidden_size], float32.
        bags: Which rows make which vector; none is empty.
        pool: How.
        size: Values to keep of each vector.

    Returns:
        Shape: [text_count, size], float32.
    """
    indices = torch.from_numpy(bags.rows).to(rows.device)
    if pool.strategy in (Strategy.CLS, Strategy.LAST):
        vectors = rows.index_select(0, indices)
    else:
        counts = torch.from_numpy(bags.counts).to(rows.device)
        offsets = counts.cumsum(0) - counts
        vectors = torch.cat([_reduce(rows, indices, offsets, counts, way) for way in _WAYS[pool.strategy]], dim=1)
    vectors = vectors[:, :size]
    return F.normalize(vectors, dim=1, eps=1e-12) if pool.normalize else vectors


def pool_words(rows: torch.Tensor, bags: Bags, pooling: WordPooling) -> torch.Tensor:
    """Pools the rows of each word; a word without rows becomes zeros.

    Args:
        rows: Shape: [row_count, row_size], float32.
        bags: Which rows make which word; some may be empty.
        pooling: How.

    Returns:
        Shape: [word_count, row_size], or twice as wide for FIRST_LAST; float32.
    """
    ends = np.cumsum(bags.counts)
    firsts, lasts = ends - bags.counts, ends - 1
    if pooling is WordPooling.MEAN:
        bagged, counts, offsets = (torch.from_numpy(one).to(rows.device) for one in (bags.rows, bags.counts, firsts))
        return _reduce(rows, bagged, offsets, counts, "mean")
    chosen = {
        WordPooling.FIRST: (firsts,),
        WordPooling.LAST: (lasts,),
        WordPooling.FIRST_LAST: (firsts, lasts),
    }[pooling]
    full = bags.counts > 0
    parts = []
    for places in chosen:
        indices = np.zeros(len(ends), np.int64)
        indices[full] = bags.rows[places[full]]
        parts.append(rows.index_select(0, torch.from_numpy(indices).to(rows.device)))
    vectors = torch.cat(parts, dim=1)
    return vectors if full.all() else vectors.masked_fill_(torch.from_numpy(~full).to(rows.device)[:, None], 0.0)


_WAYS = {
    Strategy.MEAN: ("mean",),
    Strategy.MAX: ("max",),
    Strategy.MEAN_SQRT_LEN: ("root",),
    Strategy.MEAN_MAX: ("mean", "max"),
}


def _reduce(
    rows: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor, counts: torch.Tensor, way: str
) -> torch.Tensor:
    if way == "root":
        return F.embedding_bag(indices, rows, offsets, mode="sum") / counts.sqrt()[:, None]
    return F.embedding_bag(indices, rows, offsets, mode=way)
