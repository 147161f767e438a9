"""The oracle: transformers with eager attention in float32 on the CPU. It imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from layertap_server.engine.bert import dummy_weights

POOLINGS = {
    "mean": lambda rows: rows.mean(0),
    "cls": lambda rows: rows[0],
    "max": lambda rows: rows.max(0),
    "last": lambda rows: rows[-1],
    "mean_sqrt_len": lambda rows: rows.sum(0) / np.sqrt(len(rows)),
    "mean_max": lambda rows: np.concatenate([rows.mean(0), rows.max(0)]),
}
"""Each pooling by its definition: from rows, shape [row_count, hidden_size], to one vector."""


class Oracle:
    """What transformers computes."""

    def __init__(self, model: transformers.BertModel, tokenizer_folder: Path) -> None:
        self.model = model.float().eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(str(tokenizer_folder))

    @classmethod
    def load(cls, folder: Path, tokenizer_folder: Path | None = None) -> Oracle:
        model = transformers.BertModel.from_pretrained(str(folder), attn_implementation="eager")
        return cls(model, tokenizer_folder or folder)

    def ids(self, item: Any) -> dict[str, list[int]]:
        """Tokenizes one text, pair or list of words."""
        if isinstance(item, tuple):
            return dict(self.tokenizer(*item))
        return dict(self.tokenizer(item, is_split_into_words=isinstance(item, list)))

    @torch.inference_mode()
    def run(
        self, ids: Sequence[int], mask: Sequence[int] | None = None, types: Sequence[int] | None = None
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Returns all hidden states of one text, each [token_count, hidden_size], and its pooler output."""
        count = len(ids)
        out = self.model(
            input_ids=torch.tensor([list(ids)]),
            attention_mask=torch.tensor([list(mask) if mask is not None else [1] * count]),
            token_type_ids=torch.tensor([list(types) if types is not None else [0] * count]),
            output_hidden_states=True,
        )
        return [layer[0].numpy() for layer in out.hidden_states], out.pooler_output[0].numpy()

    def text(self, item: Any) -> tuple[list[np.ndarray], np.ndarray]:
        """Tokenizes and runs one text."""
        encoded = self.ids(item)
        return self.run(encoded["input_ids"], encoded["attention_mask"], encoded["token_type_ids"])


def dummy_oracle(settings: dict[str, Any], seed: int, tokenizer_folder: Path) -> Oracle:
    """Returns the oracle with the weights that --load-format dummy gives."""
    config = transformers.BertConfig(**settings, attn_implementation="eager")
    model = transformers.BertModel(config)
    model.load_state_dict(dummy_weights(settings, seed), strict=False)
    return Oracle(model, tokenizer_folder)
