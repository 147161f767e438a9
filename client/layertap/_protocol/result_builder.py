"""The results that users hold, built from checked parts of answers: arrays under the names of transformers. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def build_embedding(
    plan: AnswerPlan,
    *,
    arrays: Mapping[Key, FloatArray],
    messages: Sequence[pb.Input],
    token_counts: IntArray,
    truncated: BoolArray,
    window_counts: IntArray,
    span_counts: Sequence[int],
    attention_mask: IntArray,
    timings: Timings,
    tokens: Sequence[pb.TokenizedText],
    words: Sequence[pb.SplitText],
    request_id: str | None = None,
) -> Embedding:
    """Returns an embedding of whole arrays.

    Raises:
        DataLossError: if the requested tokens or words are not those of the texts.
    """
    if plan.returns_tokens and [len(text.input_ids) for text in tokens] != token_counts.tolist():
        raise DataLossError("the tokens of the answer are not those of its texts; ask again")
    layer_count = plan.header.layer_count

    def states(tensors: dict[int, Key], counts: IntArray) -> HiddenStates:
        ragged = {layer: arrays[key] for layer, key in tensors.items()}
        return HiddenStates(ragged=ragged, token_counts=counts, layer_count=layer_count)

    def mixed(rows: RowsPlan, counts: IntArray) -> MixedRows | None:
        return MixedRows(layers=rows.mixed_layers, _states=states(rows.mix, counts)) if rows.mix else None

    own_words: Words | None = None
    if plan.words is not None:
        if len(words) != len(token_counts):
            raise DataLossError("the words of the answer are not those of its texts; ask again")
        word_counts = np.array([len(text.piece_counts) for text in words], np.int64)
        strings = _strings(words, messages, plan.prompt)
        vectors = states(plan.words.layers, word_counts)
        own_words = _build_words(words, strings, vectors, mixed(plan.words, word_counts))
    attentions: Attentions | None = None
    if plan.attentions:
        ragged = {layer: arrays[key] for layer, key in plan.attentions.items()}
        attentions = Attentions(ragged=ragged, heads=plan.heads, token_counts=token_counts, layer_count=layer_count)
    spans: SpanVectors | None = None
    if plan.spans:
        counts = np.array(span_counts, np.int64)
        spans = SpanVectors(span_counts=counts, _pools=tuple(states(pooling, counts) for pooling in plan.spans))
    return Embedding(
        hidden_states=states(plan.tokens.layers, token_counts),
        pools=tuple([arrays[key] for key in plan.pools]),
        token_counts=token_counts,
        truncated=truncated,
        window_counts=window_counts,
        attention_mask=attention_mask,
        model=plan.model,
        timings=timings,
        request_id=request_id,
        _pooler_output=None if plan.pooler_output is None else arrays[plan.pooler_output],
        _mixed=mixed(plan.tokens, token_counts),
        _words=own_words,
        _attentions=attentions,
        _spans=spans,
        _tokens=build_tokens(tokens, plan.header.pad_token_id) if plan.returns_tokens else None,
    )


def read_timings(timings: pb.Timings) -> Timings:
    """Returns where the time went."""
    return Timings(
        queue_time_ns=timings.queue_time_ns,
        tokenize_time_ns=timings.tokenize_time_ns,
        compute_time_ns=timings.compute_time_ns,
    )


def attention_mask(messages: Sequence[pb.Input], token_counts: IntArray) -> IntArray:
    """Returns the mask that was computed with. Shape: [text_count, length]."""
    length = max(token_counts.tolist(), default=0)
    mask = (np.arange(length) < token_counts[:, None]).astype(np.int64)
    for n, message in enumerate(messages):
        if message.HasField("token_ids") and (given := message.token_ids.attention_mask):
            mask[n, : len(given)] = given
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


def _build_words(
    texts: Sequence[pb.SplitText],
    strings: tuple[tuple[str, ...], ...],
    vectors: HiddenStates,
    mixed: MixedRows | None,
) -> Words:
    counts = vectors.token_counts.tolist()
    fits = all(len(text.offsets) == 2 * count for text, count in zip(texts, counts, strict=True))
    fits &= all(0 <= text.first_word_count <= count for text, count in zip(texts, counts, strict=True))
    if not fits:
        raise DataLossError("the words of the answer are not those of its texts; ask again")
    return Words(
        word_counts=vectors.token_counts,
        piece_counts=tuple(np.array(text.piece_counts, np.int64) for text in texts),
        offsets=tuple(np.array(text.offsets, np.int64).reshape(-1, 2) for text in texts),
        sequence_ids=tuple(
            (np.arange(count) >= text.first_word_count).astype(np.int64)
            for text, count in zip(texts, counts, strict=True)
        ),
        _states=vectors,
        _mixed=mixed,
        strings=strings,
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
