"""The options of an embed request, checked and resolved for one model; its outputs are read in `output_spec`.

A fault is refused by its field, the limit and the next step.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from layertap import wire
from layertap.errors import InvalidArgumentError
from layertap.types import Limits
from layertap.v1 import embedding_pb2 as pb
from layertap_server.model.facts import ModelFacts
from layertap_server.model.files import shortened
from layertap_server.model.sentence_config import SentenceConfig
from layertap_server.model.tokenizer import Tokenizer
from layertap_server.model.tokenizer_engine import Detail, Tokenizing
from layertap_server.protocol import output_spec
from layertap_server.protocol.output_spec import known
from layertap_server.protocol.validation import most_plain_tokens
from layertap_server.types import Plan, Windowing

MAX_PROMPT_CHARACTERS: Final = 10_000
"""Characters of a prompt, which may have to be tokenized alone before any text is read."""

_LISTED_LENGTH: Final = 1000
"""Characters of the names of prompts in an error: gRPC loses one whose message is longer than its metadata may be."""
_TRUNCATIONS: Final = {number: name for name, number in wire.TRUNCATIONS.items()}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of an embed request, checked and resolved for one model.

    Attributes:
        prompt: What is put before each text.
        tokenizing: How texts with their prompt are tokenized.
        most_plain_tokens: See `validation.most_plain_tokens`.
    """

    plan: Plan
    prompt: str
    tokenizing: Tokenizing
    most_plain_tokens: int


def resolve(
    options: pb.EmbedOptions, *, model: ModelFacts, sentences: SentenceConfig, tokenizer: Tokenizer, limits: Limits
) -> Options:
    """Returns resolved options.

    Raises:
        InvalidArgumentError: if an option is at fault.
        FailedPreconditionError: if the model has no pooler, or no sentence vectors that can be made here.
    """
    plan = output_spec.plan(options, model, sentences)
    prompt = _prompt(options, sentences)
    max_length = max_length_of(options.max_length, model, at_most=model.max_length)
    if prompt and not sentences.include_prompt:
        first_row = tokenizer.prompt_token_count(prompt, max_length=max_length, lower_case=options.lower_case)
        plan = plan.pooling_from(first_row)
    detail = Detail.SPECIAL_TOKENS if plan.excludes_special_tokens else Detail.NOTHING
    if plan.return_tokens or plan.has_words or plan.has_spans:
        detail = Detail.EVERYTHING
    return Options(
        plan=plan,
        prompt=prompt,
        tokenizing=Tokenizing(
            max_length=max_length,
            truncation=truncation_of(options.truncation),
            lower_case=options.lower_case,
            detail=detail,
            windowing=_windowing(options, max_length, tokenizer.special_token_count, limits),
            longest=model.max_length,
        ),
        most_plain_tokens=0 if plan.return_tokens else most_plain_tokens(plan, model, limits),
    )


def truncation_of(value: pb.Truncation.ValueType) -> str:
    """Returns the name of a truncation.

    Raises:
        InvalidArgumentError: if the contract does not name it.
    """
    return known("truncation", value or pb.TRUNCATION_ERROR, _TRUNCATIONS)


def max_length_of(value: int, model: ModelFacts, *, at_most: int) -> int:
    """Returns the most tokens a text may have.

    Raises:
        InvalidArgumentError: if it is out of range.
    """
    if value and not 2 <= value <= at_most:
        raise InvalidArgumentError(f"max_length is {value}; it runs from 2 to {at_most}, 0 means the model's")
    return value or model.default_max_length


def _prompt(options: pb.EmbedOptions, sentences: SentenceConfig) -> str:
    """Returns what is put before each text.

    Raises:
        InvalidArgumentError: if it is given twice or too long, or the model has no prompt of that name.
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
    if options.prompt_name not in sentences.prompts:
        raise InvalidArgumentError(
            "options.prompt_name is none of this model's prompts; it has "
            f"{shortened(', '.join(sorted(sentences.prompts)), _LISTED_LENGTH)}; or send the prompt itself"
        )
    return sentences.prompts[options.prompt_name]


def _windowing(options: pb.EmbedOptions, max_length: int, special_count: int, limits: Limits) -> Windowing | None:
    """Returns how texts of more than max_length tokens run as windows; None: they do not.

    Raises:
        InvalidArgumentError: if the stride is out of range, or texts are to be cut as well.
    """
    if not options.HasField("windows"):
        return None
    if options.truncation not in (pb.TRUNCATION_UNSPECIFIED, pb.TRUNCATION_ERROR):
        raise InvalidArgumentError("options has windows, with which no text is cut; leave truncation out")
    stride, most = options.windows.stride, max_length - special_count - 1
    if not 0 <= stride <= most:
        raise InvalidArgumentError(
            f"options.windows.stride is {stride}; with max_length {max_length} it runs from 0 to {most}"
        )
    return Windowing(stride=stride, max_count=limits.max_window_count)
