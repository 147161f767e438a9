"""Texts in, tokens out: the model's own tokenizer, as transformers runs it.

Everything a text can be at fault for is refused here, by its label and never by its content. Thread-safe: `encode` and
`decode` may run in several threads at once.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import numpy as np
import tokenizers
import transformers
from tokenizers import normalizers

from layertap.errors import LayertapError
from layertap_server.model import sentence_config
from layertap_server.model.checkpoint import Checkpoint
from layertap_server.model.facts import ModelFacts
from layertap_server.model.files import CheckpointError, reason_of
from layertap_server.model.sentence_config import SentenceConfig
from layertap_server.model.text_head import String
from layertap_server.model.tokenized import Tokenized
from layertap_server.model.tokenizer_engine import TokenizerEngine, Tokenizing
from layertap_server.model.truncation import copy
from layertap_server.types import Text

log = logging.getLogger(__name__)

Item: TypeAlias = "String | Text"
"""A string, a pair, words, or token ids that need no tokenizing."""

_UNREAD: Final = Tokenized(text=Text(np.empty(0, np.int32)))
"""Stands for a text until it is tokenized."""

_UNBOUNDED: Final = 1 << 40
"""A model_max_length above this is transformers' way to say that the tokenizer has none."""


class Tokenizer:
    """The tokenizer of one model.

    Attributes:
        description: Its whole configuration, for the fingerprint.
        special_token_ids: The ids that it adds to texts, and that of padding, ascending.
        pad_token: How the vocabulary spells that.
    """

    def __init__(self, folder: Path) -> None:
        """Loads it from tokenizer.json or vocab.txt.

        Raises:
            CheckpointError: if the folder has no tokenizer that can be read.
        """
        logging.getLogger("transformers").setLevel(logging.ERROR)
        loaded = _load(folder)
        self._decoder = loaded
        self._tokenizer = copy(loaded.backend_tokenizer)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._has_token_types = "token_type_ids" in loaded.model_input_names
        self._engine = TokenizerEngine(self._tokenizer, has_token_types=self._has_token_types)
        self.pad_token_id: int = loaded.pad_token_id if loaded.pad_token_id is not None else 0
        added = self._added_ids()
        self._highest_id = max([*added, *self._tokenizer.get_vocab(with_added_tokens=True).values()], default=-1)
        self.special_token_ids: tuple[int, ...] = tuple(sorted({*added, self.pad_token_id}))
        beside = [self._tokenizer.encode_special_tokens, self._has_token_types, self._max_length, self.pad_token_id]
        self.description = json.dumps([self._tokenizer.to_str(), *beside])
        self.pad_token: str = loaded.pad_token or self._tokenizer.id_to_token(self.pad_token_id) or ""

    @property
    def special_token_count(self) -> int:
        """How many special tokens it adds to a text."""
        return self._tokenizer.num_special_tokens_to_add(False)

    def encode(
        self, items: Sequence[Item | LayertapError], labels: Sequence[str], how: Tokenizing
    ) -> list[Tokenized | LayertapError]:
        """Tokenizes texts.

        Args:
            items: The texts; an error in the place of one is returned as it is.
            labels: What to call each in an error, such as "inputs[3]".
            how: How they are tokenized.

        Returns:
            For each text its tokens, or why it is refused.
        """
        engine = self._lowering if how.lower_case else self._engine
        if set(map(type, items)) == {str}:
            return engine.encode(cast("Sequence[String]", items), labels, how)
        results: list[Tokenized | LayertapError] = []
        strings: list[int] = []
        words: list[int] = []
        for n, item in enumerate(items):
            if isinstance(item, Text):
                results.append(Tokenized(text=item))
            elif isinstance(item, LayertapError):
                results.append(item)
            else:
                (words if isinstance(item, list) else strings).append(n)
                results.append(_UNREAD)
        for places in (strings, words):
            if places and len(places) == len(results):
                return engine.encode(cast("Sequence[String]", items), labels, how)
            if places:
                some = [cast("String", items[n]) for n in places]
                for n, one in zip(places, engine.encode(some, [labels[n] for n in places], how), strict=True):
                    results[n] = one
        return results

    def sentence_config(self, checkpoint: Checkpoint) -> SentenceConfig:
        """Returns what a model's folder says about sentences, where it is silent with what its tokenizer says."""
        return sentence_config.read(
            checkpoint.folder,
            hidden_size=checkpoint.settings.hidden_size,
            max_length=self._max_length,
            position_count=checkpoint.settings.position_count,
            truncation=self._decoder.truncation_side,
        )

    @property
    def _max_length(self) -> int:
        """`model_max_length`, or a number above every model's positions."""
        return int(min(self._decoder.model_max_length, _UNBOUNDED))

    def _added_ids(self) -> set[int]:
        """Returns the ids that are added to a text or a pair."""
        try:
            encodings = [self._tokenizer.encode("", pair) for pair in (None, "")]
        except Exception as exc:
            raise CheckpointError(
                f"the tokenizer of the model cannot tokenize the empty text ({reason_of(exc)}); fetch the model again"
            ) from exc
        return {
            token_id
            for one in encodings
            for token_id, special in zip(one.ids, one.special_tokens_mask, strict=True)
            if special
        }

    def check_fits(self, checkpoint: Checkpoint) -> None:
        """Checks that all ids are the model's.

        Raises:
            CheckpointError: if one is not.
        """
        vocab_size = checkpoint.settings.vocab_size
        if self._highest_id >= vocab_size:
            raise CheckpointError(
                f"the tokenizer has ids up to {self._highest_id}, the model's vocab_size is {vocab_size}: its ids must "
                f"end at {vocab_size - 1}; were tokens added without resize_token_embeddings, "
                "or does vocab.txt repeat a line? fetch the model's own tokenizer"
            )

    def model_facts(self, checkpoint: Checkpoint, *, fingerprint: str, has_pooler: bool) -> ModelFacts:
        """Returns what the server knows of a model with this tokenizer, which must fit it."""
        settings = checkpoint.settings
        return ModelFacts(
            model_id=checkpoint.name,
            fingerprint=fingerprint,
            layer_count=settings.num_hidden_layers,
            hidden_size=settings.hidden_size,
            head_count=settings.num_attention_heads,
            vocab_size=settings.vocab_size,
            type_vocab_size=settings.type_vocab_size,
            max_length=settings.position_count,
            default_max_length=min(self._max_length, settings.position_count),
            has_pooler_output=has_pooler,
            pad_token_id=self.pad_token_id,
            special_token_ids=self.special_token_ids,
            special_tokens=self._special_tokens(),
            padding_side=self._decoder.padding_side,
            has_token_type_ids=self._has_token_types,
            model_type=settings.model_type,
        )

    def _special_tokens(self) -> dict[str, int]:
        """Returns the ids of the tokens that the configuration names, as far as they are in the vocabulary."""
        named = {name: token for name, token in self._decoder.special_tokens_map.items() if isinstance(token, str)}
        ids = {name: self._tokenizer.token_to_id(token) for name, token in named.items()}
        return {name: token_id for name, token_id in ids.items() if token_id is not None}

    def mark_special_tokens(self, one: Tokenized) -> Tokenized:
        """Returns a text that says which of its tokens are special: those added, or of token ids those by their id."""
        if one.encoding is not None:
            mask = np.array(one.encoding.special_tokens_mask, np.int32)
        else:
            mask = np.isin(one.text.input_ids, self.special_token_ids).astype(np.int32)
        return dataclasses.replace(one, text=dataclasses.replace(one.text, special_tokens_mask=mask))

    def prompt_token_count(self, prompt: str, *, max_length: int, lower_case: bool) -> int:
        """Returns how many tokens of a text its prompt takes, with those that the tokenizer puts before it.

        Counted on the prompt alone, as sentence-transformers counts it.
        """
        engine = self._lowering if lower_case else self._engine
        ids = engine.ids(prompt)
        closed = not set(ids[-1:]).isdisjoint(self.special_token_ids)
        return min(len(ids), max_length) - closed

    @functools.cached_property
    def _lowering(self) -> TokenizerEngine:
        """The same tokenizer, which makes strings lower case first."""
        lowering = copy(self._tokenizer)
        normalizer = lowering.normalizer
        first = normalizers.Lowercase()
        lowering.normalizer = normalizers.Sequence([first, normalizer]) if normalizer else first
        return TokenizerEngine(lowering, has_token_types=self._has_token_types)

    def decode(self, texts: Sequence[Sequence[int]], *, skip_special_tokens: bool) -> list[str]:
        """Returns the strings of token ids, as transformers' batch_decode does."""
        # Of one list of ids `decode` makes one str; transformers types it for lists of lists too.
        return [cast("str", self._decoder.decode(list(ids), skip_special_tokens=skip_special_tokens)) for ids in texts]

    def pieces(self, text: Text) -> list[str]:
        """Returns the vocabulary's spelling of token ids that came as ids."""
        return [self._tokenizer.id_to_token(int(token_id)) or "" for token_id in text.input_ids]


_CONVERT: Final = (
    'make a tokenizer.json in the model folder: `python -c "from transformers import AutoTokenizer as A; '
    "A.from_pretrained('.').save_pretrained('.')\"`"
)


def _load(folder: Path) -> Any:
    try:
        loaded: Any = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        if not loaded.is_fast or not isinstance(loaded.backend_tokenizer, tokenizers.Tokenizer):
            raise CheckpointError(
                f"the tokenizer of the model is a {type(loaded).__name__}, which transformers runs in Python; layertap "
                "needs a tokenizer that tokenizer.json can describe, take a model that has one"
            )
        if set(loaded.get_vocab().values()) <= set(loaded.all_special_ids):  # transformers found no file of its type.
            raise CheckpointError(
                f"transformers makes a {type(loaded).__name__} without words of the files in the model folder: they do "
                f"not belong to the model_type of config.json; fetch the whole model, or {_CONVERT}"
            )
        length, sides = loaded.model_max_length, (loaded.truncation_side, loaded.padding_side)
        if not isinstance(length, int | float) or not length >= 1 or not {*sides} <= {"left", "right"}:
            raise CheckpointError(
                f"tokenizer_config.json has model_max_length {length!r}, truncation_side {sides[0]!r} and padding_side "
                f"{sides[1]!r}; the first must be a number from 1, the others left or right"
            )
        return loaded
    except CheckpointError:
        raise
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as exc:  # Libraries of two languages; a panic of the other is no Exception.
        if not (folder / "tokenizer.json").is_file() and (folder / "sentencepiece.bpe.model").is_file():
            raise CheckpointError(
                f"transformers cannot read sentencepiece.bpe.model; fetch the model again, or, where it can, {_CONVERT}"
            ) from exc
        raise CheckpointError(
            f"the tokenizer of the model cannot be read ({reason_of(exc)}); fetch the model again, or correct the file"
        ) from exc
