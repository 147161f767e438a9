"""Token rows into one vector a text, in float32 on the device."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from layertap_server.encoder.layout import Bags
from layertap_server.work import Pool, Strategy


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
