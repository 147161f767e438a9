"""What transformers computes for a model: every hidden state, in float32 on the CPU with eager attention.

Judges the encoder and shares nothing with it but the model's files. Serving does not use it; the tests do.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import transformers

from layertap_server.model.checkpoint import CheckpointError

Item: TypeAlias = "str | tuple[str, str] | list[str]"
"""A text, a pair, or words."""

VERSION: Final[str] = transformers.__version__

_PER_TOKEN: Final = ("input_ids", "attention_mask", "special_tokens_mask", "offset_mapping")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Wanted:
    """What one text should come to.

    Attributes:
        tokens: Its pieces.
        facts: What transformers' tokenizer says of each token, under its names; word_ids are -1 where it has None.
        layers: All hidden states. Shape of each: [token_count, hidden_size].
        pooler_output: Shape: [hidden_size]. None: models of this type have no pooler.
    """

    tokens: list[str]
    facts: dict[str, npt.NDArray[np.int64]]
    layers: list[npt.NDArray[np.float32]]
    pooler_output: npt.NDArray[np.float32] | None


class Oracle:
    """One model, as transformers runs it."""

    def __init__(self, model: Any, tokenizer_folder: Path) -> None:
        self.model = model.float().eval()
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(tokenizer_folder))
        self._has_token_types = bool(getattr(model.config, "type_vocab_size", 0))

    @classmethod
    def load(cls, folder: Path, tokenizer_folder: Path | None = None) -> Self:
        """Returns the model of a folder.

        Raises:
            CheckpointError: if transformers cannot load it.
        """
        logging.getLogger("transformers").setLevel(logging.ERROR)
        library: Any = transformers.utils.logging  # Partly without types, as is the model.
        library.disable_progress_bar()
        try:
            model: Any = transformers.AutoModel.from_pretrained(str(folder), attn_implementation="eager")
            return cls(model, tokenizer_folder or folder)
        except Exception as exc:  # transformers raises what it likes here.
            raise CheckpointError("transformers cannot load this model; fetch it again") from exc

    @torch.inference_mode()
    def forward(
        self,
        ids: Sequence[int],
        mask: Sequence[int] | None = None,
        types: Sequence[int] | None = None,
        *,
        attentions: bool = False,
    ) -> Any:
        """Returns what transformers computes for one text: all hidden states, and the pooler output, if any.

        Args:
            ids: Token ids. Shape: [token_count].
            mask: The attention mask. Shape: [token_count]. None: all 1.
            types: The token types. Shape: [token_count]. None: all 0.
            attentions: Whether to return the attention probabilities too.
        """
        given = {"input_ids": ids, "attention_mask": [1] * len(ids) if mask is None else mask}
        if self._has_token_types:
            given["token_type_ids"] = [0] * len(ids) if types is None else types
        tensors = {name: torch.tensor([list(values)]) for name, values in given.items()}
        return self.model(**tensors, output_hidden_states=True, output_attentions=attentions)

    def run(
        self, ids: Sequence[int], mask: Sequence[int] | None = None, types: Sequence[int] | None = None
    ) -> tuple[list[npt.NDArray[np.float32]], Any]:
        """Returns all hidden states of one text, each [token_count, hidden_size], and its pooler output or None.

        Args are those of `forward`.
        """
        out = self.forward(ids, mask, types)
        pooler_output = out.get("pooler_output")
        layers = [layer[0].numpy() for layer in out.hidden_states]
        return layers, None if pooler_output is None else pooler_output[0].numpy()

    def compute(self, item: Item, max_length: int) -> Wanted:
        """Computes one text; what is above max_length tokens is cut on the right."""
        encoded = self.tokenizer(
            *(item if isinstance(item, tuple) else (item,)),
            is_split_into_words=isinstance(item, list),
            truncation=True,
            max_length=max_length,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        types = encoded.get("token_type_ids") or [0] * len(encoded["input_ids"])
        layers, pooler_output = self.run(encoded["input_ids"], encoded["attention_mask"], types)
        facts = {name: np.array(encoded[name], np.int64) for name in _PER_TOKEN}
        facts["token_type_ids"] = np.array(types, np.int64)
        facts["word_ids"] = np.array([-1 if word is None else word for word in encoded.word_ids()], np.int64)
        return Wanted(tokens=encoded.tokens(), facts=facts, layers=layers, pooler_output=pooler_output)
