"""Answers of a server that lies about sizes: a named error, before memory is taken for what it announces."""

from __future__ import annotations

import pickle
from typing import Any

import grpc
import numpy as np
import pytest
from support.streams import OneConnection

from layertap import (
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    LayertapError,
    ResourceExhaustedError,
    TokenIds,
    wire,
)
from layertap._protocol import requests, responses
from layertap._protocol.answer_plan import check_header
from layertap._protocol.assembler import EmbedAssembler, LayerAssembler
from layertap._protocol.inputs import to_messages
from layertap._protocol.options import embed_options
from layertap._protocol.responses import ModelPin, read_embedding
from layertap._transport.settings import resolve
from layertap._transport.status import translate
from layertap.v1 import embedding_pb2 as pb

HUGE = 2**31 - 1
LAYER = embed_options(layers=[-1])
POOLED = embed_options(pooling="mean")
ZEROS = pb.LayerTensor(layer=3, tensor=pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[1, 4], data=bytes(16)))


def header(unit: Any, *, row_size: int = 4, token_count: int = 3, texts: int = 1) -> pb.EmbedHeader:
    return pb.EmbedHeader(
        model_id="m",
        fingerprint="f",
        dtype=pb.DTYPE_FLOAT32,
        layer_count=3,
        outputs=[pb.OutputHeader(layers=[3], row_size=row_size, unit=unit)],
        token_counts=[token_count] * texts,
        truncated=[False] * texts,
    )


@pytest.mark.parametrize("wrong", [{"token_count": HUGE}, {"row_size": HUGE}, {"texts": 2}])
@pytest.mark.parametrize("kind", [EmbedAssembler, LayerAssembler])
def test_a_header_is_held_against_the_request(kind: Any, wrong: dict[str, int]) -> None:
    assembler = kind(to_messages("x"), LAYER)
    with pytest.raises(DataLossError):
        assembler.feed(pb.EmbedLayersResponse(header=header(pb.ROW_UNIT_TOKEN, **wrong)), memoryview(b""))


def test_the_tensors_of_a_unary_answer_have_the_shapes_of_its_header() -> None:
    tensor = pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[0, 2**62, 2**62], data=b"")
    answer = pb.EmbedResponse(
        header=header(pb.ROW_UNIT_TEXT), tensors=[pb.LayerTensor(output_index=0, layer=3, tensor=tensor)]
    )
    with pytest.raises(DataLossError, match="tensors"):
        read_embedding(answer, to_messages("x"), POOLED, ModelPin())


def test_the_same_header_is_refused_for_another_request() -> None:
    good = header(pb.ROW_UNIT_TEXT)
    check_header(good, POOLED, to_messages("x"))
    for options, texts in ((LAYER, ["x"]), (POOLED, ["x", "y"])):
        with pytest.raises(DataLossError, match="not that of this request"):
            check_header(good, options, to_messages(texts))
    good.token_counts[0] = HUGE
    with pytest.raises(DataLossError, match="not that of this request"):
        check_header(good, POOLED, to_messages("x"))


@pytest.mark.parametrize("token_count", [1, 2])
def test_a_text_has_as_many_tokens_as_its_mask(token_count: int) -> None:
    texts = to_messages(TokenIds([[101, 7592, 102]], attention_mask=[[1, 1, 0]]))
    answer = pb.EmbedResponse(header=header(pb.ROW_UNIT_TEXT, token_count=token_count), tensors=[ZEROS])
    with pytest.raises(DataLossError, match=f"text 0 came with {token_count} of its 3 tokens"):
        read_embedding(answer, texts, POOLED, ModelPin())


def opened(options: pb.EmbedOptions, unit: Any) -> OneConnection:
    state = OneConnection(options, ordered=True)
    state.offer("x")
    state.take()
    state.feed(pb.EmbedStreamResponse(header=header(unit, texts=0)), memoryview(b""))
    return state


def test_a_frame_of_a_stream_is_held_against_its_item() -> None:
    frame = pb.StreamFrame(id=0, layer=3, token_count=HUGE, row_count=1)
    with pytest.raises(DataLossError, match="tokens"):
        opened(LAYER, pb.ROW_UNIT_TOKEN).feed(pb.EmbedStreamResponse(frame=frame), memoryview(bytes(16)))


def test_results_of_a_stream_have_the_bytes_of_their_rows() -> None:
    results = pb.StreamResults(ids=[0], token_counts=[5], truncated=[False], timings=[pb.Timings()])
    with pytest.raises(DataLossError, match="less data"):
        opened(LAYER, pb.ROW_UNIT_TOKEN).feed(pb.EmbedStreamResponse(results=results), memoryview(bytes(16)))


@pytest.mark.parametrize("wrong", [{"token_counts": [HUGE]}, {"token_counts": [-1]}], ids=str)
def test_a_small_result_of_a_stream_is_held_against_its_item(wrong: dict[str, list[int]]) -> None:
    fields: dict[str, Any] = {"ids": [0], "token_counts": [3], "truncated": [False], "timings": [pb.Timings()]}
    state, data = opened(POOLED, pb.ROW_UNIT_TEXT), memoryview(bytes(16))
    with pytest.raises(DataLossError):
        state.feed(pb.EmbedStreamResponse(results=pb.StreamResults(**fields | wrong)), data)
    other = opened(POOLED, pb.ROW_UNIT_TEXT)
    other.feed(pb.EmbedStreamResponse(results=pb.StreamResults(**fields)), data)
    assert len(other.ready()) == 1


def test_an_array_that_the_process_cannot_hold_is_a_named_error() -> None:
    with pytest.raises(ResourceExhaustedError, match="embed_stream"):
        wire.empty((HUGE, HUGE), pb.DTYPE_FLOAT32)


DECODE = requests.decode([1], skip_special_tokens=True).request


def test_tokens_and_strings_are_as_many_as_the_texts() -> None:
    (request,) = requests.tokenize("x")
    for texts in ([], [pb.TokenizedText()] * 2, [pb.TokenizedText(input_ids=[0] * 100_000)]):
        with pytest.raises(DataLossError, match="tokens"):
            responses.check_tokens(request.request, pb.TokenizeResponse(texts=texts), ModelPin())
    with pytest.raises(DataLossError, match="1 text requested, 2 came"):
        responses.read_texts(DECODE, pb.DecodeResponse(texts=["a", "b"]), ModelPin())


def test_answers_of_another_model_are_refused() -> None:
    (request,) = requests.tokenize("x")
    pin = ModelPin()
    pin.check("one", "1" * 64)
    tokens = pb.TokenizeResponse(model_id="other", fingerprint="2" * 64)
    vectors = pb.EmbedResponse(header=header(pb.ROW_UNIT_TEXT), tensors=[ZEROS])
    vectors.header.model_id, vectors.header.fingerprint = "other", "2" * 64
    for check in (
        lambda: responses.check_tokens(request.request, tokens, pin),
        lambda: responses.read_texts(DECODE, pb.DecodeResponse(model_id="other", fingerprint="2" * 64), pin),
        lambda: read_embedding(vectors, to_messages("x"), POOLED, pin),
    ):
        with pytest.raises(FailedPreconditionError, match="'other' with fingerprint '222222222222', before it was"):
            check()


class Failure(grpc.RpcError):
    def __init__(
        self, details: str, code: grpc.StatusCode = grpc.StatusCode.RESOURCE_EXHAUSTED, **metadata: str
    ) -> None:
        self._details, self._code, self._metadata = details, code, metadata

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> list[tuple[str, str]]:
        return [(name.replace("_", "-"), value) for name, value in self._metadata.items()]


@pytest.mark.parametrize("pushback", ["soon", "nan", "-1", "1e999", "٣"])
def test_a_retry_hint_that_is_no_number_is_none(pushback: str) -> None:
    error = translate(Failure("full", grpc_retry_pushback_ms=pushback), resolve("127.0.0.1:1"), None)
    assert isinstance(error, LayertapError) and error.retry_after_s is None


@pytest.mark.parametrize(
    ("details", "hint_s", "shown"),
    [
        ("Stream removed (Socket closed)", 0.1, "the connection to 127.0.0.1:1 broke"),
        ("recvmsg:Connection reset by peer", 0.1, "the connection to 127.0.0.1:1 broke"),
        ("failed to connect; last error: Socket closed", None, "127.0.0.1:1 ends the connection at once"),
        (
            "last error: connection attempt timed out before receiving SETTINGS frame",
            None,
            "127.0.0.1:1 takes connections",
        ),
        ("failed to connect; last error: Connection refused", None, "no server answers at 127.0.0.1:1"),
        ("DNS resolution failed", None, "no server answers at 127.0.0.1:1"),
    ],
)
def test_a_connection_that_broke_is_told_from_one_that_could_not_be_made(
    details: str, hint_s: float | None, shown: str
) -> None:
    error = translate(Failure(details, grpc.StatusCode.UNAVAILABLE), resolve("127.0.0.1:1"), None)
    assert (error.retry_after_s, error.details.startswith(shown)) == (hint_s, True), error


def test_a_servers_text_reaches_no_terminal_raw() -> None:
    error = translate(Failure("a\x1b[2Jb" + "c" * 100_000), resolve("127.0.0.1:1"), None)
    assert error.details.startswith("a\\x1b[2Jb") and len(error.details) < 5000


@pytest.mark.parametrize("kind", [InvalidArgumentError, DataLossError])
def test_no_error_has_control_characters_wherever_they_come_from(kind: type[LayertapError]) -> None:
    error = kind("model a\x1b[2J\u202eb\n", request_id="c\x9bd")
    assert str(error) == r"model a\x1b[2J\u202eb\n (request c\x9bd)" and error.args == (error.details,)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert kind("Zürich 東京 🙂").details == "Zürich 東京 🙂"


def test_bounds_leave_room_for_every_real_tokenizer() -> None:
    from layertap._protocol.answer_plan import token_bound

    (message,) = to_messages("ﷺ" * 100)  # One code point of three bytes that NFKC makes 18 of.
    assert token_bound(message.ByteSize(), LAYER) >= 18 * 100 and np.iinfo(np.int32).max > token_bound(
        message.ByteSize(), LAYER
    )
