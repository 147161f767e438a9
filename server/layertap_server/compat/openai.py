"""OpenAI's `POST /v1/embeddings` and `GET /v1/models`, for the clients that speak it.

A text becomes the vector that `Client.encode` makes of it, to the last bit: the model's folder says how (see
`sentence_config`). Requests take the way of all others: the same tokens, admission, preprocessing, queue and log. Knows
HTTP as exchanges (see `http`), and of gRPC nothing; what is JSON is read and written in `openai_messages`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from layertap.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    LayertapError,
    NotFoundError,
    UnauthenticatedError,
)
from layertap.sentence_vectors import Vectors
from layertap.v1 import embedding_pb2 as pb
from layertap_server.compat import openai_messages as messages
from layertap_server.compat.http import Exchange
from layertap_server.compat.sentences import SentenceVectors
from layertap_server.observability.call_log import REQUEST_ID, Record
from layertap_server.protocol import rows
from layertap_server.protocol.offload import LARGE_BYTES, offload
from layertap_server.protocol.preprocess import Preprocessor
from layertap_server.scheduler.batcher import Batcher
from layertap_server.scheduler.call import Hooks
from layertap_server.scheduler.events import RowsReady
from layertap_server.types import Plan

if TYPE_CHECKING:
    from layertap_server.rpc.caller import AdmittedCall

_EMBEDDINGS: Final = "/v1/embeddings"
_MODELS: Final = "/v1/models"
_NUMBER_COST: Final = 4
"""How many times as long numbers take to write as base64 does, about."""
METHODS: Final = (f"POST {_EMBEDDINGS}", f"GET {_MODELS}")
"""What the log and the metrics call the calls."""


class OpenAI:
    """Answers the API's requests with one model.

    `admit` is `Admission.call`. `identify` returns the client by its authorization, certificate and address, and raises
    UnauthenticatedError if it may not call.
    """

    def __init__(
        self,
        *,
        preprocessor: Preprocessor,
        batcher: Batcher,
        admit: Callable[..., AbstractContextManager[AdmittedCall]],
        identify: Callable[[str | None, Mapping[str, Any], str], str],
        hooks: Hooks,
    ) -> None:
        model, self._sentences = preprocessor.model, preprocessor.sentences
        self._model_id = model.model_id
        self._width = self._sentences.vector_size(model.hidden_size)
        self._preprocessor = preprocessor
        self._limits = preprocessor.limits
        self._batcher = batcher
        self._admit = admit
        self._identify = identify
        self._hooks = hooks
        self._created = int(time.time())

    async def answer(self, exchange: Exchange) -> None:
        """Answers a request, be it by an error."""
        try:
            await self._route(exchange)
        except LayertapError as exc:
            if exchange.is_answered:
                await exchange.cut()
                return
            headers = messages.error_headers(exc)
            if exc.request_id is not None:
                headers[REQUEST_ID] = exc.request_id
            with contextlib.suppress(DeadlineExceededError):  # The caller reads not even that.
                await exchange.answer(messages.status(exc), headers, messages.error_body(exc))

    async def _route(self, exchange: Exchange) -> None:
        try:
            client = self._identify(exchange.headers.get("authorization"), exchange.certificate, exchange.address)
        except UnauthenticatedError:
            self._hooks.refused("unauthenticated")
            raise
        path = exchange.path
        if path == _EMBEDDINGS:
            method, answer = METHODS[0], self._embeddings
        elif path == _MODELS or path.startswith(f"{_MODELS}/"):
            method, answer = METHODS[1], self._models
        else:
            raise NotFoundError(f"there is nothing at this path; this server answers {' and '.join(METHODS)}")
        if exchange.method != (verb := method.partition(" ")[0]):
            raise messages.MethodError(verb, f"this path has no such method; send {method}")
        with self._admit(method, client=client, connection=exchange.connection, metadata=exchange.headers) as call:
            await answer(exchange, call)

    async def _models(self, exchange: Exchange, call: AdmittedCall) -> None:
        name = exchange.path[len(_MODELS) + 1 :]
        if name and name != self._model_id:
            raise messages.ModelNotFoundError(
                f"this server has no model of that name; it has {self._model_id}, which GET /v1/models lists"
            )
        body = messages.models(self._model_id, created=self._created, is_list=not name)
        await self._send(exchange, call.record, body)

    async def _embeddings(self, exchange: Exchange, call: AdmittedCall) -> None:
        if reason := self._sentences.vectors_unsupported:
            raise FailedPreconditionError(
                f"this server makes no sentence vectors with its model: {reason}; "
                "ask for layers or a pooling with layertap's own client"
            )
        request = await self._read(exchange, call)
        inputs = [pb.Input(text=text) for text in request.texts]
        # As OpenAI's: what is cut at the caller's wish has length 1 again, where the model's vectors have it.
        normalize = self._sentences.normalize and bool(request.dimensions)
        asked = SentenceVectors(config=self._sentences, dimensions=request.dimensions, normalize=normalize)
        options = asked.options()
        options.outputs.extend(asked.outputs())
        plan, tokenized = await self._preprocessor.embed(
            inputs, options, call.record, hold=call.add_bytes, label="input"
        )
        del inputs  # The texts are tokens from here on.
        token_count = sum(one.text.token_count for one in tokenized)
        byte_count = plan.byte_counts.text * len(tokenized)
        if byte_count > self._limits.max_call_output_bytes:
            raise InvalidArgumentError(
                f"the vectors have {byte_count} bytes, the most of one request is "
                f"{self._limits.max_call_output_bytes}; send fewer texts at once"
            )
        call.add_bytes(2 * byte_count)  # The rows, and the vectors made of them.
        parts = await rows.collect(self._batcher, plan, tokenized, call, label="input")
        is_large = byte_count * (1 if request.is_base64 else _NUMBER_COST) > LARGE_BYTES

        def make() -> Vectors:
            vectors = asked.finish(_joined(parts, plan, len(tokenized)))
            if not request.is_base64:
                messages.check_finite(vectors)
            return vectors

        vectors = await offload(make, in_thread=is_large)
        answer = messages.answer(vectors, is_base64=request.is_base64, model_id=self._model_id, token_count=token_count)
        await self._send(exchange, call.record, _each(answer) if is_large else b"".join(answer))

    async def _read(self, exchange: Exchange, call: AdmittedCall) -> messages.EmbeddingsRequest:
        most, size = self._limits.max_request_bytes, 0

        def check(byte_count: int) -> None:
            if byte_count > most:
                raise messages.RequestTooLargeError(
                    f"the request has more than {most} bytes, the most of one; send fewer texts at once"
                )

        def count(byte_count: int) -> None:
            nonlocal size
            size += byte_count
            check(size)
            call.add_bytes(byte_count)

        if exchange.headers.get("content-encoding", "identity") != "identity":
            raise InvalidArgumentError("the request is compressed, which this server does not read; send it plain")
        length = exchange.headers.get("content-length", "")
        check(int(length) if length.isdecimal() else 0)
        call.expect_request()
        body = await exchange.read(count)
        call.set_busy()
        request = await offload(
            lambda: messages.read_request(body, model_id=self._model_id, max_text_count=self._limits.max_text_count),
            in_thread=len(body) > LARGE_BYTES,
        )
        if request.dimensions > self._width:
            raise messages.FieldError(
                "dimensions", f"dimensions is above {self._width}, the values of a vector; send at most that"
            )
        return request

    async def _send(self, exchange: Exchange, record: Record, body: bytes | AsyncIterator[bytes]) -> None:
        started_at_ns = time.monotonic_ns()
        try:
            record.sent_bytes += await exchange.answer(200, {REQUEST_ID: record.request_id}, body)
        except DeadlineExceededError:
            record.stalled = True
            raise
        record.send.note(started_at_ns, time.monotonic_ns())


def _joined(parts: Sequence[RowsReady], plan: Plan, text_count: int) -> Vectors:
    """Returns the rows of all outputs side by side. Shape: [text_count, values of all outputs]."""
    size = plan.outputs[0].row_size
    vectors = np.empty((text_count, size * len(plan.outputs)), np.float32)
    for part in parts:
        found = np.frombuffer(part.rows.data, "<f4").reshape(-1, size)
        start = part.rows.output_index * size
        vectors[part.first_text : part.first_text + len(found), start : start + size] = found
    return vectors


async def _each(parts: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Yields parts that are made in a thread, one after the other."""
    while (part := await offload(lambda: next(parts, b""), in_thread=True)) != b"":
        yield part
