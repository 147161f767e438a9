"""Numbers that show what a model does with a text, each from one `Embedding`: what `plot` and `layertap explore` draw.

Pure numpy. Cosines are computed in float64 and returned in float32; those of a row of zeros are 0. Layers are those
that the embedding holds, in ascending order. `text` and `texts` are positions in the request.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from layertap.results.embedding import Embedding
from layertap.types import Pooling, PoolingName

Measure: TypeAlias = Literal["cosine_to_first", "cosine_to_previous", "norm"]
"""How a token's row in one layer is compared with its rows in others."""

MEASURES: Final[tuple[Measure, ...]] = get_args(Measure)

Float32: TypeAlias = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Projection:
    """Rows of all layers on two axes that are the same for all layers.

    Attributes:
        layers: The layers.
        points: Shape: [layer, row, 2]; the rows of the chosen texts one after the other.
        token_counts: Shape: [text_count]; rows of each chosen text.
        explained: Shape: [2]; the share of the variance along each axis, from 0 to 1.
    """

    layers: tuple[int, ...]
    points: Float32
    token_counts: npt.NDArray[np.int64]
    explained: Float32


def each_layer(strategy: PoolingName, layer_count: int, *, include_special_tokens: bool = True) -> list[Pooling]:
    """Returns one pooling for each layer from 0 to `layer_count`, for `embed(pooling=…)` and then `trajectory`."""
    return [
        Pooling(strategy, layer=layer, include_special_tokens=include_special_tokens)
        for layer in range(layer_count + 1)
    ]


def cosines(rows: npt.ArrayLike, others: npt.ArrayLike) -> Float32:
    """Returns the cosine of each row with each other row. Shape: [row_count, other_count]."""
    return _float32(np.clip(_units(rows) @ _units(others).T, -1, 1))


def tokens_by_layers(embedding: Embedding, *, measure: Measure = "cosine_to_first", text: int = 0) -> Float32:
    """Returns how each token changes from layer to layer. Shape: [layer, token_count].

    Args:
        embedding: What `embed(layers="all")` returned, or with some layers.
        measure: "cosine_to_first" compares with the token's row in the lowest held layer, "cosine_to_previous" in the
            held layer below (1 in the lowest), "norm" is the Euclidean length of the row.
        text: The text.

    Raises:
        ValueError: if the measure is unknown.
        LookupError: if the embedding holds no layer.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure {measure!r} is unknown; use one of {', '.join(MEASURES)}")
    rows = _layers(embedding, text)
    if measure == "norm":
        return _float32(np.linalg.norm(rows, axis=-1))
    return _row_cosines(rows, rows[:1] if measure == "cosine_to_first" else np.concatenate([rows[:1], rows[:-1]]))


def similarity(embedding: Embedding, *, layer: int = -1, texts: tuple[int, int] = (0, 0)) -> Float32:
    """Returns the cosine of each token of one text with each of another. Shape: [token_count, other_token_count].

    Args:
        embedding: What `embed` returned; it holds the layer.
        layer: The layer.
        texts: The two texts; the same one twice compares a text with itself.

    Raises:
        IndexError: if the layer is not held.
    """
    rows = embedding.ragged(layer)
    return cosines(rows[texts[0]], rows[texts[1]])


def trajectory(embedding: Embedding, *, texts: tuple[int, int] = (0, 1)) -> Float32:
    """Returns the cosine of the pooled vectors of two texts, for each pooling. Shape: [pooling_count].

    Args:
        embedding: What `embed(pooling=each_layer("mean", layer_count))` returned: one pooling for each layer.
        texts: The two texts.

    Raises:
        LookupError: if no pooling was requested.
    """
    if not embedding.pools:
        raise LookupError("no pooling was requested; pass pooling=each_layer('mean', client.model_info().layer_count)")
    return np.array([_row_cosines(pool[texts[0]], pool[texts[1]]) for pool in embedding.pools])


def token_trajectory(embedding: Embedding, *, tokens: tuple[tuple[int, int], tuple[int, int]]) -> Float32:
    """Returns the cosine of two tokens in each held layer. Shape: [layer].

    Args:
        embedding: What `embed(layers="all")` returned.
        tokens: Both tokens, each as the position of its text and its own position in that text.

    Raises:
        LookupError: if the embedding holds no layer.
    """
    (text, token), (other_text, other) = tokens
    return _row_cosines(_layers(embedding, text)[:, token], _layers(embedding, other_text)[:, other])


def projection(embedding: Embedding, *, texts: Sequence[int] | None = None, layer: int | None = None) -> Projection:
    """Returns the tokens of all layers along the two directions in which they differ most (principal components).

    The axes and their origin are those of all held layers together, or of one layer, and the same for all: what moves
    from layer to layer has moved. The larger part of each axis points to positive numbers, so that it never flips.

    Args:
        embedding: What `embed(layers="all")` returned.
        texts: The texts; None: all.
        layer: The layer that the axes are of; None: all held layers.

    Raises:
        LookupError: if the embedding holds no layer, or not this one.
    """
    chosen = list(range(len(embedding))) if texts is None else list(texts)
    rows = np.concatenate([_layers(embedding, text) for text in chosen], axis=1)
    basis = rows if layer is None else np.concatenate([embedding.ragged(layer)[text] for text in chosen])
    basis = basis.reshape(-1, rows.shape[-1]).astype(np.float64)
    center = basis.mean(0)
    values, vectors = np.linalg.eigh((basis - center).T @ (basis - center))
    axes = vectors[:, :-3:-1]
    axes = axes * np.where(axes[np.abs(axes).argmax(0), range(axes.shape[1])] < 0, -1, 1)
    total = max(float(values.clip(0).sum()), np.finfo(np.float64).tiny)
    return Projection(
        layers=embedding.layers,
        points=((rows - center) @ axes).astype(np.float32),
        token_counts=embedding.token_counts[chosen],
        explained=(values[:-3:-1].clip(0) / total).astype(np.float32),
    )


def differences(embedding: Embedding, other: Embedding, *, text: int = 0) -> tuple[Float32, Float32]:
    """Returns how far the tokens of a text are from themselves in another embedding, as with another attention mask.

    Compares the layers that both hold, and the positions that both have.

    Args:
        embedding: What `embed(layers="all")` returned.
        other: The same for the same token ids.
        text: The text.

    Returns:
        The cosine of each token with itself, and the largest difference of one value. Shape of both:
        [layer, token_count].

    Raises:
        LookupError: if no layer is held by both.
    """
    layers = [layer for layer in embedding.layers if layer in other.layers]
    if not layers:
        raise LookupError('the embeddings hold no layer in common; pass layers="all" to both')
    pairs = [(embedding.ragged(layer)[text], other.ragged(layer)[text]) for layer in layers]
    count = min(len(pairs[0][0]), len(pairs[0][1]))
    rows, others = (np.stack([pair[n][:count] for pair in pairs]) for n in (0, 1))
    apart = np.abs(rows.astype(np.float32) - others.astype(np.float32))
    return _row_cosines(rows, others), _float32(apart.max(-1, initial=0))


def nearest(vectors: npt.ArrayLike, query: npt.ArrayLike, *, count: int = 10) -> tuple[npt.NDArray[np.int64], Float32]:
    """Returns the positions of the vectors nearest to one, nearest first, and their cosines. Shape of both: [count].

    Args:
        vectors: Shape: [vector_count, size].
        query: Shape: [size].
        count: How many at most. Of equal cosines the first position comes first.
    """
    found = cosines(vectors, np.asarray(query)[None])[:, 0]
    order = np.argsort(-found, kind="stable")[:count]
    return order, found[order]


def _layers(embedding: Embedding, text: int) -> npt.NDArray[Any]:
    """Returns the rows of one text in all held layers. Shape: [layer, token_count, hidden_size]."""
    if not embedding.layers:
        raise LookupError('the embedding holds no layer; pass layers="all"')
    return np.stack([embedding.ragged(layer)[text] for layer in embedding.layers])


def _row_cosines(rows: npt.ArrayLike, others: npt.ArrayLike) -> Float32:
    """Returns the cosine of each row with the row at the same place."""
    return _float32(np.clip((_units(rows) * _units(others)).sum(-1), -1, 1))


def _units(rows: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Returns rows divided by their lengths; rows of zeros stay so."""
    wide = np.asarray(rows, np.float64)
    lengths = np.linalg.norm(wide, axis=-1, keepdims=True)
    return wide / np.where(lengths == 0, 1, lengths)


def _float32(values: npt.ArrayLike) -> Float32:
    return np.asarray(values, np.float32)
