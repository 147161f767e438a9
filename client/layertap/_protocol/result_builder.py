"""The results that users hold, built from checked parts of answers: arrays under the names of transformers. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from layertap._protocol.answer_plan import AnswerPlan, Key, RowsPlan
from layertap.errors import DataLossError
from layertap.results.attentions import Attentions
from layertap.results.embedding import Embedding
from layertap.results.hidden_states import HiddenStates
from layertap.results.spans import SpanVectors
from layertap.results.tokens import Tokens
from layertap.results.words import MixedRows, Words
from layertap.types import BoolArray, FloatArray, IntArray, Timings
from layertap.v1 import embedding_pb2 as pb

_PER_TOKEN_FIELDS = ("tokens", "attention_mask", "token_type_ids", "special_tokens_mask", "word_ids")


class Answer(NamedTuple):
    """All that came for some texts: their rows, and what describes them.

    A tuple, since there is one for each text of a stream.

    Attributes:
        arrays: The rows of each tensor.
        token_counts: Shape: [text_count].
        truncated: Whether tokens were cut. Shape: [text_count].
        window_counts: How many windows each text ran as. Shape: [text_count].
        span_counts: The spans of each text, if an output has a row for each.
        attention_mask: Shape: [text_count, length].
        timings: Where the time went.
        tokens: The tokens of each text if they were requested.
        words: The words of each text if they were requested.
    """

    arrays: Mapping[Key, FloatArray]
    token_counts: IntArray
    truncated: BoolArray
    window_counts: IntArray
    span_counts: Sequence[int]
    attention_mask: IntArray
    timings: Timings
    tokens: Sequence[pb.TokenizedText]
    words: Sequence[pb.SplitText]


def build_embedding(
    plan: AnswerPlan, answer: Answer, messages: Sequence[pb.Input], request_id: str | None = None
) -> Embedding:
    """Returns the embedding of some texts.

    Raises:
        DataLossError: if the requested tokens or words are not those of the texts.
    """
    token_counts, tokens = answer.token_counts, answer.tokens
    if plan.returns_tokens and [len(text.input_ids) for text in tokens] != token_counts.tolist():
        raise DataLossError("the tokens of the answer are not those of its texts; ask again")
    return Embedding(
        hidden_states=_states(plan, plan.tokens.layers, answer, token_counts),
        pools=tuple([answer.arrays[key] for key in plan.pools]),
        token_counts=token_counts,
        truncated=answer.truncated,
        window_counts=answer.window_counts,
        attention_mask=answer.attention_mask,
        model=plan.model,
        timings=answer.timings,
        request_id=request_id,
        _pooler_output=None if plan.pooler_output is None else answer.arrays[plan.pooler_output],
        _mixed=_mixed(plan, plan.tokens, answer, token_counts) if plan.tokens.mix else None,
        _words=None if plan.words is None else _words(plan, plan.words, answer, messages),
        _attentions=_attentions(plan, answer) if plan.attentions else None,
        _spans=_spans(plan, answer) if plan.spans else None,
        _tokens=build_tokens(tokens, plan.header.pad_token_id) if plan.returns_tokens else None,
    )


def _states(plan: AnswerPlan, tensors: dict[int, Key], answer: Answer, row_counts: IntArray) -> HiddenStates:
    ragged = {layer: answer.arrays[key] for layer, key in tensors.items()}
    return HiddenStates(ragged=ragged, token_counts=row_counts, layer_count=plan.header.layer_count)


def _mixed(plan: AnswerPlan, rows: RowsPlan, answer: Answer, row_counts: IntArray) -> MixedRows:
    return MixedRows(layers=rows.mixed_layers, _states=_states(plan, rows.mix, answer, row_counts))


def _attentions(plan: AnswerPlan, answer: Answer) -> Attentions:
    ragged = {layer: answer.arrays[key] for layer, key in plan.attentions.items()}
    return Attentions(
        ragged=ragged, heads=plan.heads, token_counts=answer.token_counts, layer_count=plan.header.layer_count
    )


def _spans(plan: AnswerPlan, answer: Answer) -> SpanVectors:
    counts = np.array(answer.span_counts, np.int64)
    return SpanVectors(
        span_counts=counts, _pools=tuple(_states(plan, tensors, answer, counts) for tensors in plan.spans)
    )


def read_timings(timings: pb.Timings) -> Timings:
    """Returns where the time went."""
    return Timings(
        queue_time_ns=timings.queue_time_ns,
        tokenize_time_ns=timings.tokenize_time_ns,
        compute_time_ns=timings.compute_time_ns,
    )


def attention_mask(messages: Sequence[pb.Input], token_counts: IntArray) -> IntArray:
    """Returns the mask that was computed with. Shape: [text_count, length].

    Raises:
        DataLossError: if a text has not as many tokens as its mask.
    """
    counts = token_counts.tolist()
    mask = np.ones((len(counts), max(counts, default=0)), np.int64)
    if len(set(counts)) > 1:
        mask[:] = np.arange(mask.shape[1]) < token_counts[:, None]
    for n, (message, count) in enumerate(zip(messages, counts, strict=True)):
        if message.HasField("token_ids") and (given := message.token_ids.attention_mask):
            if len(given) != count:
                raise DataLossError(f"text {n} came with {count} of its {len(given)} tokens; ask again")
            mask[n, :count] = given
    return mask


def _strings(texts: Sequence[pb.SplitText], messages: Sequence[pb.Input], prompt: str) -> tuple[tuple[str, ...], ...]:
    """Returns the words of each text as they stand in it, after the prompt."""
    found: list[tuple[str, ...]] = []
    for text, message in zip(texts, messages, strict=True):
        if message.HasField("words"):
            found.append(tuple(message.words.words))
            continue
        first = prompt + (message.text if message.HasField("text") else message.pair.first)
        spans = zip(text.offsets[::2], text.offsets[1::2], strict=False)
        found.append(
            tuple(
                (first if place < text.first_word_count else message.pair.second)[start:end]
                for place, (start, end) in enumerate(spans)
            )
        )
    return tuple(found)


def _words(plan: AnswerPlan, rows: RowsPlan, answer: Answer, messages: Sequence[pb.Input]) -> Words:
    texts = answer.words
    counts = [len(text.piece_counts) for text in texts]
    fits = len(texts) == len(answer.token_counts)
    fits &= all(len(text.offsets) == 2 * count for text, count in zip(texts, counts, strict=True))
    fits &= all(0 <= text.first_word_count <= count for text, count in zip(texts, counts, strict=True))
    if not fits:
        raise DataLossError("the words of the answer are not those of its texts; ask again")
    word_counts = np.array(counts, np.int64)
    return Words(
        word_counts=word_counts,
        piece_counts=tuple(np.array(text.piece_counts, np.int64) for text in texts),
        offsets=tuple(np.array(text.offsets, np.int64).reshape(-1, 2) for text in texts),
        sequence_ids=tuple(
            (np.arange(count) >= text.first_word_count).astype(np.int64)
            for text, count in zip(texts, counts, strict=True)
        ),
        _states=_states(plan, rows.layers, answer, word_counts),
        _mixed=_mixed(plan, rows, answer, word_counts) if rows.mix else None,
        strings=_strings(texts, messages, plan.prompt),
    )


def build_tokens(texts: Sequence[pb.TokenizedText], pad_token_id: int, *, request_id: str | None = None) -> Tokens:
    """Returns tokenized texts as rectangular arrays; what lies past a text's tokens is padding.

    Raises:
        DataLossError: if a text's lists differ in length.
    """
    counts = np.array([len(text.input_ids) for text in texts], np.int64)
    for text, count in zip(texts, counts, strict=True):
        lengths = {len(getattr(text, name)) for name in _PER_TOKEN_FIELDS}
        if lengths != {count} or len(text.offset_mapping) != 2 * count:
            raise DataLossError("the lists of a tokenized text differ in length; ask again")
    shape = len(texts), int(counts.max(initial=0))
    inside = np.arange(shape[1]) < counts[:, None]

    def fill(name: str, rest: int) -> IntArray:
        array = np.full(shape, rest, np.int64)
        array[inside] = np.concatenate([np.array(getattr(text, name), np.int64) for text in texts])
        return array

    offsets = np.zeros((*shape, 2), np.int64)
    offsets[inside] = np.concatenate([np.array(text.offset_mapping, np.int64).reshape(-1, 2) for text in texts])
    return Tokens(
        tokens=[list(text.tokens) for text in texts],
        input_ids=fill("input_ids", pad_token_id),
        attention_mask=fill("attention_mask", 0),
        token_type_ids=fill("token_type_ids", 0),
        special_tokens_mask=fill("special_tokens_mask", 1),
        word_ids=fill("word_ids", -1),
        offset_mapping=offsets,
        token_counts=counts,
        truncated=np.array([text.truncated for text in texts], np.bool_),
        request_id=request_id,
    )
