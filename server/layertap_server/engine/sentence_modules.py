"""The modules of sentence-transformers on the device: Dense and Normalize, on token rows or on pooled vectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from layertap_server.engine.invariance import Rowwise
from layertap_server.engine.linear import Linears, filled_up, row_step
from layertap_server.engine.weight_reader import load_weights
from layertap_server.model.sentence_config import SentenceConfig
from layertap_server.model.sentence_modules import Dense, Module

Apply = Callable[[torch.Tensor], torch.Tensor]
"""Computes each row by itself. Shape: [row_count, in_size] to [row_count, out_size], float32."""


class SentenceModules:
    """The modules of one model on one device; `padded` says how many rows to compute for so many.

    Attributes:
        rowwise: Each Dense, for the probe of batch invariance.
    """

    def __init__(self, sentences: SentenceConfig | None, linears: Linears, padded: Callable[[int], int]) -> None:
        """Loads the weights of the modules that a model's folder names; None: it names none.

        Raises:
            CheckpointError: if weights cannot be read.
        """
        self.rowwise: list[Rowwise] = []
        self._linears, self._padded = linears, padded
        self._tokens = [self._load(module) for module in sentences.token_modules] if sentences else []
        self._vectors = [self._load(module) for module in sentences.vector_modules] if sentences else []

    def of_tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """Applies the modules of token rows. Shape: [row_count, hidden_size] to [row_count, token_size], float32."""
        for apply in self._tokens:
            rows = apply(rows)
        return rows

    def of_vectors(self, vectors: torch.Tensor) -> torch.Tensor:
        """Applies the modules of vectors. Shape: [text_count, pooled size] to [text_count, vector_size], float32."""
        for apply in self._vectors:
            vectors = apply(vectors)
        return vectors

    def _load(self, module: Module) -> Apply:
        if not isinstance(module, Dense):
            return lambda rows: F.normalize(rows, dim=1, eps=1e-12)
        weights = load_weights(module.weights, f"{module.weights.name} of {module.weights.parent.name}")
        no_bias = torch.zeros(module.out_size)
        linears = self._linears
        linear = linears.make(weights["linear.weight"], weights.get("linear.bias", no_bias))
        projected = weights.get("residual.weight")
        residual = None if projected is None else linears.make(projected, no_bias)
        activation: Apply = getattr(torch.nn, module.activation)()
        step = row_step(module.out_size)

        def apply(rows: torch.Tensor) -> torch.Tensor:
            row_count = len(rows)
            rows = filled_up(rows, -(-self._padded(row_count) // step) * step)
            found = activation(linears(rows, linear))
            if module.has_residual:
                found = found + (rows if residual is None else linears(rows, residual))
            return found[:row_count]

        self.rowwise.append(Rowwise(apply, module.in_size))
        return apply
