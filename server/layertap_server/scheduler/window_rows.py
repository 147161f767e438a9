"""Rows of a whole text from the parts that its windows make of them: pools, words, the pooler output.

Pure, numpy only. A part is in float32; sums are taken in float64 and in the order of the windows, so that the bits do
not depend on which batches the windows were in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from layertap.errors import LayertapError
from layertap_server.types import ApplyModules, Output, OutputKind, Pool, Strategy, Text, Vectors, WordPooling
from layertap_server.types.errors import NARROW_LIMITS, unsendable


def whole_rows(
    output: Output, whole: Text, windows: Sequence[Text], parts: Sequence[Vectors], apply_modules: ApplyModules
) -> Vectors:
    """Returns the rows of a text.

    The windows are in order. Shape of each part: [rows of the window, row size of a part].

    Returns:
        Shape: [rows of the text, row_size].
    """
    if output.kind is OutputKind.POOLER_OUTPUT:
        return parts[0]
    if output.word_pooling is not None:
        return _words(output, whole, windows, parts)
    if output.kind is OutputKind.SPAN_VECTORS:
        return _spans(output, whole, windows, parts)
    columns = np.split(np.concatenate(parts), len(output.pools), axis=1)  # Pools that are joined are equally wide.
    pooled = [_pooled(pool, windows, values) for pool, values in zip(output.pools, columns, strict=True)]
    vector = np.concatenate(pooled)[None]
    if output.applies_modules:
        vector = apply_modules(vector)
    return _finished(output, vector)


def narrowed(rows: Vectors, dtype: str, layer: int) -> tuple[memoryview, LayertapError | None]:
    """Returns rows as they are sent, and why they cannot be sent, if so."""
    peak = np.abs(rows).max(initial=np.float32(0))
    error = (
        None if peak < NARROW_LIMITS[dtype] else unsendable(finite=bool(np.isfinite(peak)), layer=layer, dtype=dtype)
    )
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(rows).view(np.uint32)
        sent = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)  # To nearest, ties to even.
        return sent.reshape(-1).view(np.uint8).data, error
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(rows, dtype).reshape(-1).view(np.uint8).data, error


def _pooled(pool: Pool, windows: Sequence[Text], values: Vectors) -> Vectors:
    """Pools over windows. Shape: [window_count, size] to [size]."""
    counts = np.array([len(pool.positions(window)) for window in windows], np.float64)
    return _combined(pool, values[counts > 0], counts[counts > 0])


def _finished(output: Output, vectors: Vectors) -> Vectors:
    """Returns pooled vectors cut and normalized. Shape: [vector_count, pooled size] to [vector_count, row_size]."""
    vectors = vectors[:, : output.row_size]
    if output.pool is not None and output.pool.normalize:
        vectors = vectors / np.maximum(np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True), 1e-12)
    return np.ascontiguousarray(vectors, np.float32)


def _spans(output: Output, whole: Text, windows: Sequence[Text], parts: Sequence[Vectors]) -> Vectors:
    """Returns the rows of spans, which may have tokens in several windows."""
    if whole.spans is None:
        return np.zeros((0, output.row_size), np.float32)
    assert output.pool is not None
    found = np.zeros((whole.span_count, parts[0].shape[1]), np.float32)
    cut: defaultdict[int, list[tuple[Vectors, int]]] = defaultdict(list)
    for window, part in zip(windows, parts, strict=True):
        assert window.spans is not None and window.span_indices is not None
        counts, indices = window.spans.counts, window.span_indices
        is_cut = counts < whole.spans.counts[indices]
        found[indices[~is_cut]] = part[~is_cut]
        for n in np.flatnonzero(is_cut).tolist():
            cut[int(indices[n])].append((part[n], int(counts[n])))
    for index, own in cut.items():
        values = np.stack([value for value, _ in own])
        found[index] = _combined(output.pool, values, np.array([count for _, count in own], np.float64))
    return _finished(output, found)


def _combined(pool: Pool, values: Vectors, counts: np.ndarray) -> Vectors:
    """Pools what was pooled in parts of so many rows, none empty. Shape: [part_count, size] to [size]."""
    if pool.strategy in (Strategy.CLS, Strategy.LAST):
        vector: Vectors = values[0 if pool.strategy is Strategy.CLS else -1]
        return vector
    if pool.strategy is Strategy.MAX:
        peak: Vectors = values.max(0)
        return peak
    if pool.strategy is Strategy.MEAN_MAX:
        means, peaks = np.split(values, 2, axis=1)
        return np.concatenate([_mean(means, counts), peaks.max(0)])
    if pool.strategy is Strategy.MEAN_SQRT_LEN:
        return _summed(values, np.sqrt(counts), np.sqrt(counts.sum()))
    return _mean(values, counts)


def _mean(values: Vectors, counts: np.ndarray) -> Vectors:
    return _summed(values, counts, counts.sum())


def _summed(values: Vectors, weights: np.ndarray, divisor: float) -> Vectors:
    summed: Vectors = ((values * weights[:, None]).sum(0) / divisor).astype(np.float32)
    return summed


def _words(output: Output, whole: Text, windows: Sequence[Text], parts: Sequence[Vectors]) -> Vectors:
    """Returns the rows of words, of which the ends of windows may cut some."""
    assert whole.words is not None
    counts = whole.words.piece_counts
    rows = np.zeros((len(counts), output.row_size), np.float32)
    own = [(window.word_indices, window.words, part) for window, part in zip(windows, parts, strict=True)]
    half = output.row_size // 2 if output.word_pooling is WordPooling.FIRST_LAST else 0
    if output.word_pooling is WordPooling.FIRST or half:
        first = slice(0, half or output.row_size)
        for indices, _, part in reversed(own):  # So that the first part of a word comes last.
            rows[indices, first] = part[:, first]
    if output.word_pooling is WordPooling.LAST or half:
        for indices, _, part in own:
            rows[indices, half:] = part[:, half:]
    if output.word_pooling is WordPooling.MEAN:
        cut: dict[int, np.ndarray] = {}
        for indices, words, part in own:
            assert indices is not None and words is not None
            is_cut = words.piece_counts < counts[indices]
            rows[indices[~is_cut]] = part[~is_cut]
            for n in np.flatnonzero(is_cut).tolist():
                word = int(indices[n])
                cut[word] = cut.get(word, 0.0) + part[n].astype(np.float64) * words.piece_counts[n]
        for word, total in cut.items():
            rows[word] = total / counts[word]
    return rows
