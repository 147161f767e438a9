"""The numbers that every side of bench/wire.py sends: all layers of a model of bert-base's shape, made once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

WIDTH = 768
LAYER_COUNT = 13
ROW_BYTES = 4 * WIDTH
FRAME_ROWS = (3 << 20) // ROW_BYTES
"""Rows of a frame, on every side: 3 MiB."""

Rows = npt.NDArray[np.float32]


def block(row_count: int) -> Rows:
    """Returns rows for all layers: layer k begins at row k, and no two rows are equal.

    Args:
        row_count: Rows of one layer.

    Returns:
        Shape: [row_count + LAYER_COUNT, WIDTH]. Value: row + column / 1024.
    """
    rows = np.arange(row_count + LAYER_COUNT, dtype=np.float32)[:, np.newaxis]
    return rows + np.arange(WIDTH, dtype=np.float32) / 1024


def check(layers: Sequence[Sequence[Rows]], row_count: int) -> None:
    """Checks what has arrived: for each layer its rows, in order, in one array or several."""
    whole = [np.concatenate(parts) if len(parts) > 1 else parts[0] for parts in layers]
    columns = np.arange(WIDTH, dtype=np.float32) / 1024
    good = len(whole) == LAYER_COUNT and all(
        rows.shape == (row_count, WIDTH)
        and bool((rows[:, :1] == whole[0][:, :1] + k).all() and (rows - rows[:, :1] == columns).all())
        for k, rows in enumerate(whole)
    )
    if not good:
        raise SystemExit("what arrived is not what was sent")
