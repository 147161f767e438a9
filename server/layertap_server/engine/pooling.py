"""Token rows into one vector a text or a word, in float32 on the device.

What a pooling reads is known before the first layer is computed, so it is added to the batch's upload then; applying it
to a layer waits for nothing.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch.nn import functional as F

from layertap_server.engine.packing import Bags
from layertap_server.engine.upload import Sent, Upload
from layertap_server.types import Pool, Strategy, WordPooling

_WAYS: Final = {
    Strategy.MEAN: ("mean",),
    Strategy.MAX: ("max",),
    Strategy.MEAN_SQRT_LEN: ("root",),
    Strategy.MEAN_MAX: ("mean", "max"),
}


class _SentBags:
    """Bags of rows on the device."""

    def __init__(self, bags: Bags, upload: Upload) -> None:
        self._rows, self._counts = upload.add(bags.rows), upload.add(bags.counts)
        self._offsets = upload.add(np.cumsum(bags.counts) - bags.counts)

    def reduce(self, rows: torch.Tensor, way: str) -> torch.Tensor:
        """Makes one row of each bag. Shape: [row_count, row_size] to [bag_count, row_size]."""
        mode = "sum" if way == "root" else way
        reduced = F.embedding_bag(self._rows.tensor, rows, self._offsets.tensor, mode=mode)
        return reduced / self._counts.tensor.sqrt()[:, None] if way == "root" else reduced


class TextPooling:
    """The vectors of some texts: rows pooled, cut to a size, then normalized."""

    def __init__(self, bags: Bags, pool: Pool, size: int | None, upload: Upload) -> None:
        """Adds what it needs to the batch's upload: bags, none of them empty. Without a size vectors stay whole."""
        self._pool, self._size = pool, size
        self._chosen: Sent | None = None
        if pool.strategy in (Strategy.CLS, Strategy.LAST):
            self._chosen = upload.add(bags.rows)
        else:
            self._bags = _SentBags(bags, upload)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Pools a layer. Shape: [row_count, hidden_size] to [text_count, size], float32."""
        if self._chosen is not None:
            vectors = rows.index_select(0, self._chosen.tensor)
        else:
            vectors = torch.cat([self._bags.reduce(rows, way) for way in _WAYS[self._pool.strategy]], dim=1)
        vectors = vectors[:, : self._size]
        return F.normalize(vectors, dim=1, eps=1e-12) if self._pool.normalize else vectors


class WordsPooling:
    """The vectors of the words of some texts; a word without rows becomes zeros."""

    def __init__(self, bags: Bags, pooling: WordPooling, upload: Upload) -> None:
        """Adds what it needs to the batch's upload: bags, some of which may be empty."""
        self._bags: _SentBags | None = None
        self._ends: list[Sent] = []
        self._empty: Sent | None = None
        if pooling is WordPooling.MEAN:
            self._bags = _SentBags(bags, upload)
            return
        ends = np.cumsum(bags.counts)
        firsts, lasts = ends - bags.counts, ends - 1
        chosen = {
            WordPooling.FIRST: (firsts,),
            WordPooling.LAST: (lasts,),
            WordPooling.FIRST_LAST: (firsts, lasts),
        }[pooling]
        full = bags.counts > 0
        for places in chosen:
            rows = np.zeros(len(ends), np.int64)
            rows[full] = bags.rows[places[full]]
            self._ends.append(upload.add(rows))
        if not full.all():
            self._empty = upload.add(~full)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Pools a layer. Shape: [row_count, row_size] to [word_count, row_size], or twice as wide for FIRST_LAST."""
        if self._bags is not None:
            return self._bags.reduce(rows, "mean")
        vectors = torch.cat([rows.index_select(0, end.tensor) for end in self._ends], dim=1)
        return vectors if self._empty is None else vectors.masked_fill_(self._empty.tensor[:, None], 0.0)
