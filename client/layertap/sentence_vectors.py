"""The last steps from pools to the vectors of sentence-transformers: normalize if the model does, cut, normalize.

Pure, with numpy as its only library. The SDK's `encode` and the servers of other protocols share it, so that the same
texts have the same bits over each of them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]

_LEAST_LENGTH = 1e-12
"""A shorter vector is divided by this instead of its length, as torch does."""


def finish(vectors: Vectors, *, model_normalizes: bool, dimensions: int, normalize: bool) -> Vectors:
    """Returns what `SentenceTransformer.encode` makes of pooled vectors.

    Args:
        vectors: The pools of each text, one beside the other; may be changed in place. Shape: [text_count, width].
        model_normalizes: Whether the model's folder has a Normalize module.
        dimensions: How many values of each vector are kept; 0 keeps all.
        normalize: Whether vectors are divided by their length after that. What the model normalizes is not done twice.

    Returns:
        Vectors. Shape: [text_count, dimensions or width].
    """
    if model_normalizes and not normalize:
        _normalize(vectors)
    if dimensions:
        vectors = np.ascontiguousarray(vectors[:, :dimensions])
    if normalize:
        _normalize(vectors)
    return vectors


def _normalize(vectors: Vectors) -> None:
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    vectors /= np.maximum(lengths, _LEAST_LENGTH, dtype=np.float32)[:, None]
