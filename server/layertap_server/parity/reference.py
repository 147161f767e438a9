"""What transformers computes for a model: every hidden state, in float32 on the CPU with eager attention.

Judges the encoder and shares nothing with it but the model's files. Serving does not use it.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import transformers

from layertap_server.model.checkpoint import Checkpoint, CheckpointError

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

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Loads it.

        Raises:
            CheckpointError: if transformers cannot load it.
        """
        logging.getLogger("transformers").setLevel(logging.ERROR)
        library: Any = transformers.utils.logging  # Partly without types, as is the model.
        library.disable_progress_bar()
        try:
            folder = str(checkpoint.weights_folder)
            model: Any = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager")
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(checkpoint.tokenizer_folder))
        except Exception as exc:  # transformers raises what it likes here.
            raise CheckpointError("transformers cannot load this model; fetch it again") from exc
        self._model = model.float().eval()
        self._has_token_types = bool(checkpoint.settings.type_vocab_size)

    @torch.inference_mode()
    def compute(self, item: Item, max_length: int) -> Wanted:
        """Computes one text; what is above max_length tokens is cut on the right."""
        words = isinstance(item, list)
        encoded = self._tokenizer(
            *(item if isinstance(item, tuple) else (item,)),
            is_split_into_words=words,
            truncation=True,
            max_length=max_length,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        types = encoded.get("token_type_ids") or [0] * len(encoded["input_ids"])
        given = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        if self._has_token_types:
            given["token_type_ids"] = types
        out = self._model(**{name: torch.tensor([ids]) for name, ids in given.items()}, output_hidden_states=True)
        facts = {name: np.array(encoded[name], np.int64) for name in _PER_TOKEN}
        facts["token_type_ids"] = np.array(types, np.int64)
        facts["word_ids"] = np.array([-1 if word is None else word for word in encoded.word_ids()], np.int64)
        return Wanted(
            tokens=encoded.tokens(),
            facts=facts,
            layers=[layer[0].numpy() for layer in out.hidden_states],
            pooler_output=None if out.get("pooler_output") is None else out.pooler_output[0].numpy(),
        )
