"""What an embedding of one text is in a part: the rows it has in each column, and what columns these are."""

from __future__ import annotations

import numpy as np

from layertap.jobs.npy import Array
from layertap.jobs.parts import Column
from layertap.results.embedding import Embedding


def rows_of(embedding: Embedding) -> tuple[tuple[Column, ...], list[Array]]:
    """Returns columns, and the rows of each; names are those of `Embedding.to_arrow`."""
    named = [(column.name, np.asarray(column.values), column.counts) for column in embedding.columns()]
    columns = tuple(
        Column(
            name=name,
            dtype=rows.dtype.str,
            row_shape=rows.shape[1:],
            counts="" if counts is None else next(other for other, values, _ in named if values is counts),
        )
        for name, rows, counts in named
    )
    return columns, [rows for _, rows, _ in named]
