"""Layer 0: the embeddings of token ids, types and positions, and their projection where the model has one."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from layertap_server.engine.linear import Dense
from layertap_server.engine.weight_reader import WeightReader


class Embeddings:
    """The embeddings of one model on one device.

    Attributes:
        size: Values of an embedding before it is projected.
        projection: To the hidden size; None: embeddings have it already.
    """

    def __init__(self, reader: WeightReader) -> None:
        self._linears = reader.linears
        settings = reader.settings
        self._epsilon = settings.layer_norm_eps
        self.size = size = settings.embedding_size
        self._words = reader.table("embeddings.word_embeddings.weight", settings.vocab_size, size)
        self._positions = reader.table("embeddings.position_embeddings.weight", settings.max_position_embeddings, size)
        types = settings.type_vocab_size
        self._types = reader.table("embeddings.token_type_embeddings.weight", types, size) if types else None
        self._norm = reader.norm("embeddings", size)
        self.projection: Dense | None = None
        if size != settings.hidden_size:
            self.projection = reader.linear("embeddings_project", out_size=settings.hidden_size, in_size=size)

    def __call__(
        self, input_ids: torch.Tensor, token_type_ids: torch.Tensor | None, position_ids: torch.Tensor
    ) -> torch.Tensor:
        """Returns layer 0. Shape: [row_count], three times, to [row_count, hidden_size], float32.

        Without `token_type_ids` all are 0.
        """
        rows = F.embedding(input_ids, self._words)
        if self._types is not None:
            rows += self._types[0] if token_type_ids is None else F.embedding(token_type_ids, self._types)
        rows += F.embedding(position_ids, self._positions)
        return self.project(F.layer_norm(rows, rows.shape[-1:], *self._norm, self._epsilon))

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        """Projects embeddings. Shape: [row_count, size] to [row_count, hidden_size], float32."""
        return rows if self.projection is None else self._linears(rows, self.projection)
