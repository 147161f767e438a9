"""Vectors for scikit-learn: `LayertapVectorizer`. Needs scikit-learn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, TransformerMixin

from layertap.client import Client
from layertap.types import LayerMix, Pooling, PoolingName, TruncationName


class LayertapVectorizer(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn ships no types.
    """Texts to pooled vectors of one layer, as a step of a Pipeline, whose parameters can be searched."""

    def __init__(
        self,
        client: Client | str | None = None,
        *,
        layer: int | LayerMix = -1,
        pooling: PoolingName = "mean",
        include_special_tokens: bool = True,
        normalize: bool = False,
        dimensions: int | None = None,
        truncation: TruncationName = "right",
        max_length: int | None = None,
    ) -> None:
        """Keeps the parameters; what is wrong with one is said when texts are transformed.

        Args:
            client: A client, or the server as in `Client`. Clones share it; other processes get its settings.
            layer: The layer, or mix of layers, that is pooled.
            pooling: How the rows of a text become one vector: the strategy of a `Pooling`.
            include_special_tokens: As in `Pooling`.
            normalize: As in `Pooling`.
            dimensions: As in `Pooling`.
            truncation: The side of a long text that is cut, or "error".
            max_length: The most tokens of one text; None: the model's.
        """
        self.client = client
        self.layer = layer
        self.pooling = pooling
        self.include_special_tokens = include_special_tokens
        self.normalize = normalize
        self.dimensions = dimensions
        self.truncation = truncation
        self.max_length = max_length

    def fit(self, X: Iterable[str], y: Any = None) -> Self:
        """Returns itself: nothing is fitted."""
        return self

    def transform(self, X: Iterable[str]) -> npt.NDArray[np.float32]:
        """Returns one vector for each text. Shape: [text_count, row size]."""
        pooling = Pooling(self.pooling, self.layer, self.include_special_tokens, self.normalize, self.dimensions)
        given = self.client
        with contextlib.nullcontext(given) if isinstance(given, Client) else Client(given) as client:
            results = client.embed_stream(
                X, on_error="raise", pooling=pooling, truncation=self.truncation, max_length=self.max_length
            )
            vectors = [result.embedding.pooled for result in results]
        if not vectors:
            raise ValueError("X has no texts; pass at least one")
        return np.concatenate(vectors)

    def __sklearn_clone__(self) -> Self:
        return type(self)(**self.get_params(deep=False))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit, tags.no_validation = False, True
        tags.input_tags.string, tags.input_tags.two_d_array = True, False
        return tags
