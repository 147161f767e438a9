"""Requests of the contract, checked and turned into the server's own words.

All that a caller can get wrong before tokenizing is refused here, by field or item, limit and next step, and never by
the text itself. Beside `responses` and `service` the only file that reads protobuf.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

import numpy as np

from layertap import wire
from layertap.errors import InvalidArgumentError, LayertapError
from layertap.v1 import embedding_pb2 as pb
from layertap_server.model.facts import ModelFacts
from layertap_server.model.sentence_config import SentenceConfig
from layertap_server.model.tokenizer import Item, Tokenized, Tokenizer
from layertap_server.protocol import output_spec
from layertap_server.types import Ids, Plan, Text

MAX_PROMPT_CHARACTERS: Final = 10_000
"""Characters of a prompt, which may have to be tokenized for itself before any text is read."""

_WITHOUT_PROMPT: Final = {"pair": "a pair", "words": "words", "token_ids": "token ids"}
_TRUNCATIONS: Final = {number: name for name, number in wire.TRUNCATIONS.items()}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the checks need to know of the limits.

    Attributes:
        text_count: Texts in one message.
        character_count: Unicode code points in one text.
        output_bytes: Computed but unsent tensors of one call.
    """

    text_count: int
    character_count: int
    output_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Intake:
    """Reads requests for one model under some limits.

    Attributes:
        model: What it can do.
        limits: What it may be asked.
        sentences: What its folder says about prompts.
        tokenizer: What knows how long a prompt is.
    """

    model: ModelFacts
    limits: Limits
    sentences: SentenceConfig
    tokenizer: Tokenizer

    def plan(self, options: pb.EmbedOptions) -> Plan:
        """Returns what is asked of each text.

        Raises:
            InvalidArgumentError: An option is at fault.
            FailedPreconditionError: The model has no pooler.
        """
        plan = output_spec.plan(options, self.model)
        prompt = self.prompt(options)
        if not prompt or self.sentences.include_prompt:
            return plan
        max_length = self.max_length(options.max_length, at_most=self.model.max_length)
        return plan.pooling_from(
            self.tokenizer.prompt_token_count(prompt, max_length=max_length, lower_case=options.lower_case)
        )

    def prompt(self, options: pb.EmbedOptions) -> str:
        """Returns what is put before each text.

        Raises:
            InvalidArgumentError: It is asked for twice, too long, or not known by that name.
        """
        if not options.prompt_name:
            if len(options.prompt) > MAX_PROMPT_CHARACTERS:
                raise InvalidArgumentError(
                    f"options.prompt has {len(options.prompt)} characters, the most is {MAX_PROMPT_CHARACTERS}; "
                    "shorten it, or make it part of each text"
                )
            return options.prompt
        if options.prompt:
            raise InvalidArgumentError("options has both prompt and prompt_name; set one of them")
        if options.prompt_name not in self.sentences.prompts:
            raise InvalidArgumentError(
                "options.prompt_name is none of this model's prompts; it has "
                f"{', '.join(sorted(self.sentences.prompts))}; or send the prompt itself"
            )
        return self.sentences.prompts[options.prompt_name]

    def truncation(self, value: pb.Truncation.ValueType) -> str:
        """Returns the name of a truncation.

        Raises:
            InvalidArgumentError: Nobody knows it.
        """
        return output_spec.known("truncation", value or pb.TRUNCATION_ERROR, _TRUNCATIONS)

    def max_length(self, value: int, *, at_most: int) -> int:
        """Returns the most tokens a text may have.

        Raises:
            InvalidArgumentError: It is out of range.
        """
        if value and not 2 <= value <= at_most:
            raise InvalidArgumentError(f"max_length is {value}; it runs from 2 to {at_most}, 0 means the model's")
        return value or self.model.default_max_length

    def check_text_count(self, count: int) -> None:
        """Checks how many texts a message has.

        Raises:
            InvalidArgumentError: There are none, or too many.
        """
        if not count:
            raise InvalidArgumentError("inputs is empty; send at least one text")
        if count > self.limits.text_count:
            raise InvalidArgumentError(
                f"inputs has {count} texts, the most is {self.limits.text_count}; "
                "use embed_stream (the RPC EmbedStream) for any number of texts"
            )

    def item(self, message: pb.Input, label: str, *, prompt: str = "") -> Item:
        """Returns one text, ready for the tokenizer, with what is put before it.

        Raises:
            InvalidArgumentError: It is at fault; the error calls it by its label.
        """
        kind = message.WhichOneof("kind")
        if prompt and kind in _WITHOUT_PROMPT:
            raise InvalidArgumentError(
                f"{label} is {_WITHOUT_PROMPT[kind]}, before which no prompt can be put; send a plain string, or leave "
                "the prompt out"
            )
        if kind == "token_ids":
            return self._token_ids(message.token_ids, label)
        item: Item
        if kind == "text":
            item = prompt + message.text
            size = len(item)
        elif kind == "pair":
            item = message.pair.first, message.pair.second
            size = len(message.pair.first) + len(message.pair.second)
        elif kind == "words":
            item = list(message.words.words)
            size = sum(map(len, item)) + len(item)
        else:
            raise InvalidArgumentError(f"{label} has no kind; set text, pair, words or token_ids")
        if size > self.limits.character_count:
            raise InvalidArgumentError(
                f"{label} has {size} characters, the most is {self.limits.character_count}; split it into several texts"
            )
        return item

    def checked(self, plan: Plan, result: Tokenized | LayertapError, label: str) -> Tokenized | LayertapError:
        """Returns the result of tokenizing, or why the model cannot do with its text what the plan asks."""
        if isinstance(result, LayertapError):
            return result
        if error := _misfit(result.text, self.model, label):
            return error
        if plan.excludes_special_tokens:
            result = self.tokenizer.mark_special_tokens(result)
        if plan.has_words:
            if result.encoding is None:
                return InvalidArgumentError(
                    f"{label} is token ids, which have no words; send text or words, or ask for hidden_states"
                )
            result = result.split()
        if (size := plan.byte_counts.of(result.text)) > self.limits.output_bytes:
            return InvalidArgumentError(
                f"the outputs of {label} take {size} bytes, the most is {self.limits.output_bytes}; ask for fewer "
                "layers at once, or shorten it"
            )
        for output in plan.outputs:
            if output.pool is not None and output.pool.is_empty(result.text):
                return InvalidArgumentError(
                    f"{label} has nothing to pool over: every token is masked, special or a prompt's; unmask some, "
                    "include special tokens, or leave the prompt out"
                )
        return result

    def decodable(self, texts: Sequence[pb.TokenIds]) -> list[list[int]]:
        """Returns the ids of texts that are to become strings.

        Raises:
            InvalidArgumentError: There are none or too many, or an id is out of range.
        """
        if not texts:
            raise InvalidArgumentError("texts is empty; send at least one text")
        if len(texts) > self.limits.text_count:
            raise InvalidArgumentError(
                f"texts has {len(texts)} entries, the most is {self.limits.text_count}; send them in several requests"
            )
        for n, text in enumerate(texts):
            self._check_ids(text, f"texts[{n}]")
        return [list(text.input_ids) for text in texts]

    def _token_ids(self, message: pb.TokenIds, label: str) -> Text:
        ids = self._check_ids(message, label)
        if not len(ids):
            raise InvalidArgumentError(f"{label} has no input_ids; for the empty text send the ids of [CLS] and [SEP]")
        if len(ids) > self.model.max_length:
            raise InvalidArgumentError(
                f"{label} has {len(ids)} token ids, the most is {self.model.max_length}; "
                "token ids are never cut, send fewer"
            )
        mask = _beside(message.attention_mask, "attention_mask", 2, len(ids), label)
        types = _beside(message.token_type_ids, "token_type_ids", self.model.type_vocab_size, len(ids), label)
        return Text(
            ids,
            attention_mask=mask if mask is not None and not mask.all() else None,
            token_type_ids=types if types is not None and types.any() else None,
        )

    def _check_ids(self, message: pb.TokenIds, label: str) -> Ids:
        ids = np.array(message.input_ids, np.int32)
        if len(ids) and not (ids.min() >= 0 and ids.max() < self.model.vocab_size):
            position = int(np.flatnonzero((ids < 0) | (ids >= self.model.vocab_size))[0])
            raise InvalidArgumentError(
                f"{label}.input_ids[{position}] is outside the vocabulary; "
                f"ids run from 0 to {self.model.vocab_size - 1}"
            )
        return ids


def _misfit(text: Text, model: ModelFacts, label: str) -> LayertapError | None:
    """Returns why the model cannot compute a text, whatever the tokenizer made of it; None: it can."""
    if not text.token_count:
        return InvalidArgumentError(
            f"{label} has no tokens, and this model's tokenizer adds none to it; leave the text out, or send token_ids"
        )
    if text.token_count > model.max_length:
        return InvalidArgumentError(
            f"{label} has {text.token_count} tokens, this model has {model.max_length} positions; shorten it"
        )
    if (highest := int(text.input_ids.max())) >= model.vocab_size:
        return InvalidArgumentError(
            f"{label} has token id {highest}, this model's vocabulary ends at {model.vocab_size - 1}: its tokenizer "
            "does not belong to it; leave the text out, or serve the model with its own tokenizer"
        )
    types = text.token_type_ids
    if types is not None and types.max() >= model.type_vocab_size:
        return InvalidArgumentError(
            f"{label} has token type {types.max()}, this model has {model.type_vocab_size}: it takes no pairs; send "
            "the two strings as one text, or as two"
        )
    return None


def _beside(values: Sequence[int], name: str, end: int, length: int, label: str) -> Ids | None:
    """Returns numbers that come one a token, if they were sent."""
    if not values:
        return None
    if len(values) != length:
        raise InvalidArgumentError(f"{label}.{name} has {len(values)} entries, input_ids {length}; make them equal")
    array = np.array(values, np.int32)
    if not (array.min() >= 0 and array.max() < end):
        raise InvalidArgumentError(f"{label}.{name} has an entry that is not from 0 to {end - 1}; mend it")
    return array
