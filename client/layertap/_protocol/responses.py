"""Answers of the server, checked against their requests and handed on as results.

Pure. An answer is held against its request here, before memory is taken for its arrays; `result_builder` gives the
arrays the names that users know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from google.protobuf.message import Message

from layertap import wire
from layertap._protocol.answer_plan import AnswerPlan, Key, check_header, tensor_shapes, token_bound
from layertap._protocol.requests import ResponseT
from layertap._protocol.result_builder import Answer, attention_mask, build_embedding, build_tokens, read_timings
from layertap.errors import DataLossError, FailedPreconditionError, counted
from layertap.results.embedding import Embedding
from layertap.results.tokens import Tokens
from layertap.types import FloatArray, ModelRef
from layertap.v1 import embedding_pb2 as pb

_OTHER_TENSORS: Final = "the tensors of the answer are not those of its header; ask again"


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
    plan = check_header(header, options, messages)
    pin.check(header.model_id, header.fingerprint)
    shapes = tensor_shapes(plan, header)
    arrays: dict[Key, FloatArray] = {}
    for one in answer.tensors:
        key = one.output_index, one.layer
        if shapes.pop(key, None) != tuple(one.tensor.shape[:]):
            raise DataLossError(_OTHER_TENSORS)
        arrays[key] = wire.tensor_to_array(one.tensor)
    if shapes:
        raise DataLossError(_OTHER_TENSORS)
    return build_whole(
        header,
        plan,
        arrays,
        messages,
        timings=answer.timings,
        tokens=answer.tokens,
        words=answer.words,
        request_id=request_id,
    )


def build_whole(
    header: pb.EmbedHeader,
    plan: AnswerPlan,
    arrays: dict[Key, FloatArray],
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
    if [len(text.piece_counts) for text in words] != header.word_counts[:]:
        raise DataLossError("the words of the answer are not those of its header; ask again")
    token_counts = np.array(header.token_counts[:], np.int64)
    return build_embedding(
        plan,
        Answer(
            arrays=arrays,
            token_counts=token_counts,
            truncated=np.array(header.truncated[:], np.bool_),
            window_counts=np.array(header.window_counts[:] or [1] * len(messages), np.int64),
            span_counts=header.span_counts,
            attention_mask=attention_mask(messages, token_counts),
            timings=read_timings(timings),
            tokens=tokens,
            words=words,
        ),
        messages,
        request_id,
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
