"""Attention probabilities, for the texts that ask for them alone.

The attention of a block is a function of the layer that the block reads. So the probabilities of block k + 1 are made
of the rows of layer k, beside the pass and not inside it: nothing in the pass changes, the other texts of the batch
keep their fast attention, and no block is run for its probabilities alone. They cost one more projection of the texts
that ask.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from layertap_server.engine.bert import Bert
from layertap_server.engine.host_copy import ChosenRows
from layertap_server.engine.packing import PackedBatch
from layertap_server.engine.upload import Sent, Upload


class AttentionOutput:
    """The attention probabilities of the texts of some runs, as transformers' eager attention computes them."""

    def __init__(
        self, bert: Bert, packed_batch: PackedBatch, runs: Sequence[int], heads: Sequence[int], upload: Upload
    ) -> None:
        """Adds what it needs to the batch's upload."""
        self._bert = bert
        self._rows = ChosenRows(packed_batch.rows(runs), upload)
        self._heads = upload.add(np.array(heads))
        # Text by text, not padded to equal lengths: the products of a text must not depend on its batch.
        self._texts: list[tuple[int, Sent | None]] = [
            (text.token_count, None if text.attention_mask is None else upload.add(text.attention_mask == 0))
            for text in packed_batch.texts(runs)
        ]

    def __call__(self, rows: torch.Tensor, layer: int) -> torch.Tensor:
        """Returns the probabilities of the block that reads a layer of this number.

        Of each text, for each query and key, there is one value for each head. Shape: [row_count, hidden_size],
        float32, to [sum of token_count², head_count].
        """
        queries, keys = self._bert.queries_and_keys(self._rows.of(rows), layer)
        queries, keys = (one.index_select(0, self._heads.tensor) for one in (queries, keys))
        found, start = [], 0
        for count, masked in self._texts:
            text = slice(start, start + count)
            # In memory of their own: a product of rows that begin elsewhere can have other bits.
            query, key = queries[:, text].contiguous(), keys[:, text].contiguous()
            scores = query @ key.transpose(1, 2)
            if masked is not None:
                # Masked scores become equally low, so that a text whose mask is all zeros attends to all alike.
                scores += masked.tensor * torch.finfo(torch.float32).min
            found.append(scores.softmax(-1).permute(1, 2, 0).reshape(count * count, -1))
            start += count
        return found[0] if len(found) == 1 else torch.cat(found)
