"""Answers of the server, checked against their requests and handed on as results.

Pure. An answer is held against its request here, before memory is taken for its arrays; `result_builder` gives the
arrays the names that users know.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from google.protobuf.message import Message

from layertap import wire
from layertap._protocol.requests import ResponseT
from layertap._protocol.result_builder import EmbeddingBuilder, attention_mask, build_tokens, read_timings
from layertap.errors import DataLossError, FailedPreconditionError, counted
from layertap.results.embedding import Embedding
from layertap.results.tokens import Tokens
from layertap.types import FloatArray, IntArray, ModelRef
from layertap.v1 import embedding_pb2 as pb

_MOST_TOKENS_A_BYTE = 16
_MOST_MORE_TOKENS = 1024
_MOST_ROW_SIZE = 1 << 22

_UNITS = {
    "hidden_states": pb.ROW_UNIT_TOKEN,
    "word_vectors": pb.ROW_UNIT_WORD,
    "pooler_output": pb.ROW_UNIT_TEXT,
    "pooled_vectors": pb.ROW_UNIT_TEXT,
    "attentions": pb.ROW_UNIT_TOKEN_PAIR,
    "span_vectors": pb.ROW_UNIT_SPAN,
}


class ModelPin:
    """The fingerprint of the one model of a client: of the first that answers, or given. Threads may share it."""

    def __init__(self, fingerprint: str | None = None) -> None:
        self._model = None if fingerprint is None else ModelRef(model_id="fingerprint=", fingerprint=fingerprint)

    def check(self, model_id: str, fingerprint: str) -> None:
        """Keeps the first model, and checks that each later one is the same.

        Raises:
            FailedPreconditionError: if it is another one; the message names both.
        """
        first = self._model
        if first is None:
            self._model = ModelRef(model_id=model_id, fingerprint=fingerprint)
        elif first.fingerprint != fingerprint:
            raise FailedPreconditionError(
                f"another model answers: {model_id!r} with fingerprint {fingerprint[:12]!r}, before it was "
                f"{first.model_id!r} with {first.fingerprint[:12]!r}; a client serves one model, so that vectors are "
                "never mixed: make a new client for the other one, or let target name servers of one model"
            )


def has_words(options: pb.EmbedOptions) -> bool:
    """Returns whether an output with a row for each word is requested."""
    return any(output.HasField("word_vectors") for output in options.outputs)


def has_spans(options: pb.EmbedOptions) -> bool:
    """Returns whether an output with a row for each span is requested."""
    return any(output.HasField("span_vectors") for output in options.outputs)


def span_count(message: pb.Input) -> int:
    """Returns how many spans a text has."""
    return len(message.spans.bounds) // 2 if message.HasField("spans") else 0


def row_counts(
    unit: pb.RowUnit.ValueType,
    token_counts: Sequence[int] | IntArray,
    word_counts: Sequence[int] | IntArray,
    span_counts: Sequence[int] | IntArray,
) -> Sequence[int] | IntArray:
    """Returns how many rows each text has in an output. Shape: [text_count]."""
    if unit == pb.ROW_UNIT_TOKEN:
        return token_counts
    if unit == pb.ROW_UNIT_TOKEN_PAIR:
        return [int(count) ** 2 for count in token_counts]
    if unit == pb.ROW_UNIT_SPAN:
        return span_counts
    return word_counts if unit == pb.ROW_UNIT_WORD else [1] * len(token_counts)


def token_bound(byte_count: int, options: pb.EmbedOptions) -> int:
    """Returns more tokens or words than any tokenizer makes of a text of so many bytes.

    No more memory than for these is allocated for one text.
    """
    return _MOST_TOKENS_A_BYTE * (byte_count + 4 * len(options.prompt)) + _MOST_MORE_TOKENS


def check_header(header: pb.EmbedHeader, options: pb.EmbedOptions, messages: Sequence[pb.Input]) -> None:
    """Checks that a header is that of a request.

    Args:
        header: What opens the answer.
        options: What was asked.
        messages: The texts that were sent; none for a stream, whose results carry their own counts.

    Raises:
        DataLossError: if it is not.
    """
    wire.array_dtype(header.dtype)
    text_count = len(messages)
    fits = (
        len(header.outputs) == len(options.outputs) > 0
        and len(header.token_counts) == len(header.truncated) == text_count
        and len(header.word_counts) == (text_count if has_words(options) else 0)
        and list(header.span_counts) == (list(map(span_count, messages)) if has_spans(options) else [])
        and len(header.window_counts) == (text_count if options.HasField("windows") else 0)
        and all(0 < count <= tokens for count, tokens in zip(header.window_counts, header.token_counts, strict=False))
        and all(map(_is_output, options.outputs, header.outputs))
    )
    if fits and text_count:
        bounds = [token_bound(message.ByteSize(), options) for message in messages]
        fits = all(0 < count <= bound for count, bound in zip(header.token_counts, bounds, strict=True))
        fits &= all(0 <= count <= bound for count, bound in zip(header.word_counts, bounds, strict=False))
    if not fits:
        raise DataLossError("the header is not that of this request; ask again")


def _is_output(asked: pb.Output, output: pb.OutputHeader) -> bool:
    kind = asked.WhichOneof("kind")
    assert kind is not None
    mixed = kind not in ("pooler_output", "attentions") and getattr(asked, kind).HasField("mix")
    layers = output.layers
    return (
        0 < output.row_size <= _MOST_ROW_SIZE
        and output.unit == _UNITS[kind]
        and len(output.heads) == (output.row_size if kind == "attentions" else 0)
        and mixed == bool(output.mixed_layers)
        and (len(layers) == 1 or (output.unit != pb.ROW_UNIT_TEXT and not mixed))
        and len(set(layers)) == len(layers) > 0
    )


def tensor_shapes(header: pb.EmbedHeader) -> dict[tuple[int, int], tuple[int, int]]:
    """Returns the shape of each tensor that a header promises, by output index and layer: [row_count, row_size]."""
    shapes: dict[tuple[int, int], tuple[int, int]] = {}
    for output_index, output in enumerate(header.outputs):
        row_count = sum(row_counts(output.unit, header.token_counts, header.word_counts, header.span_counts))
        shapes.update(((output_index, layer), (row_count, output.row_size)) for layer in output.layers)
    return shapes


def read_embedding(
    answer: pb.EmbedResponse,
    messages: list[pb.Input],
    options: pb.EmbedOptions,
    pin: ModelPin,
    request_id: str | None = None,
) -> Embedding:
    """Returns a unary answer to a request, whose texts and options are given.

    Raises:
        DataLossError: if the answer is not that of the request.
        FailedPreconditionError: if another model answers than before.
    """
    header = answer.header
    check_header(header, options, messages)
    pin.check(header.model_id, header.fingerprint)
    found = [((one.output_index, one.layer), tuple(one.tensor.shape)) for one in answer.tensors]
    shapes = tensor_shapes(header)
    if len(found) != len(shapes) or dict(found) != shapes:
        raise DataLossError("the tensors of the answer are not those of its header; ask again")
    arrays = {(one.output_index, one.layer): wire.tensor_to_array(one.tensor) for one in answer.tensors}
    return build_whole(
        header,
        options,
        arrays,
        messages,
        timings=answer.timings,
        tokens=answer.tokens,
        words=answer.words,
        request_id=request_id,
    )


def build_whole(
    header: pb.EmbedHeader,
    options: pb.EmbedOptions,
    arrays: dict[tuple[int, int], FloatArray],
    messages: list[pb.Input],
    *,
    timings: pb.Timings,
    tokens: Sequence[pb.TokenizedText],
    words: Sequence[pb.SplitText],
    request_id: str | None,
) -> Embedding:
    """Returns the embedding of all texts of one request.

    Raises:
        DataLossError: if the tokens or the words are not those of the header.
    """
    if [len(text.piece_counts) for text in words] != list(header.word_counts):
        raise DataLossError("the words of the answer are not those of its header; ask again")
    token_counts = np.array(header.token_counts, np.int64)
    return EmbeddingBuilder(header, options).build(
        arrays=arrays,
        messages=messages,
        token_counts=token_counts,
        truncated=np.array(header.truncated, np.bool_),
        span_counts=header.span_counts,
        window_counts=np.array(header.window_counts or [1] * len(messages), np.int64),
        attention_mask=attention_mask(messages, token_counts),
        timings=read_timings(timings),
        tokens=tokens,
        words=words,
        request_id=request_id,
    )


def read_whole(raw: bytes, kind: type[ResponseT]) -> ResponseT:
    """Parses a unary response."""
    try:
        return kind.FromString(raw)
    except Exception as exc:
        raise DataLossError(f"the answer is no {kind.DESCRIPTOR.name}; is this a layertap server?") from exc


def check_tokens(request: Message, answer: pb.TokenizeResponse, pin: ModelPin) -> None:
    """Checks that an answer to one request of `tokenize` is no larger than its texts can make it.

    Raises:
        DataLossError: if it is.
        FailedPreconditionError: if another model answers than the client's.
    """
    pin.check(answer.model_id, answer.fingerprint)
    assert isinstance(request, pb.TokenizeRequest)
    bounds = [max(token_bound(message.ByteSize(), pb.EmbedOptions()), request.pad_to) for message in request.inputs]
    counts = [len(text.input_ids) for text in answer.texts]
    if len(counts) != len(bounds) or any(count > bound for count, bound in zip(counts, bounds, strict=True)):
        raise DataLossError("the tokens of the answer are not those of the texts; ask again")


def read_tokens(answers: Sequence[pb.TokenizeResponse], request_id: str | None) -> Tokens:
    """Reads what `tokenize` requested."""
    texts = [text for one in answers for text in one.texts]
    return build_tokens(texts, answers[0].pad_token_id, request_id=request_id)


def read_texts(request: Message, answer: pb.DecodeResponse, pin: ModelPin) -> list[str]:
    """Reads what `decode` requested.

    Raises:
        DataLossError: if there is not one string for each text.
        FailedPreconditionError: if another model answers than the client's.
    """
    pin.check(answer.model_id, answer.fingerprint)
    assert isinstance(request, pb.DecodeRequest)
    if len(answer.texts) != len(request.texts):
        raise DataLossError(f"{counted(len(request.texts), 'text')} requested, {len(answer.texts)} came; ask again")
    return list(answer.texts)
