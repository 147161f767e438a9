"""What only the contract can say wrongly, by the generated stub: the exact code and a message that helps."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.in_process import serving
from support.refusals import GOOD, PATIENCE_S, SECRET, Stub, check_message, raw_refused

from layertap.errors import StatusCode
from layertap.v1 import embedding_pb2 as pb

INVALID = grpc.StatusCode.INVALID_ARGUMENT
ALL_LAYERS = pb.Output(hidden_states=pb.HiddenStates(all_layers=True))


@pytest.fixture(scope="module")
def channel(tiny_folder: Path) -> Iterator[grpc.Channel]:
    with serving(tiny_folder) as address, grpc.insecure_channel(address) as opened:
        yield opened


@pytest.fixture
def stub(channel: grpc.Channel, caplog: pytest.LogCaptureFixture) -> Iterator[Stub]:
    """After the test the server still answers, and has logged no text."""
    caplog.set_level(logging.DEBUG)
    made = Stub(channel)
    yield made
    assert len(made.Embed(pb.EmbedRequest(inputs=[pb.Input(text=GOOD)], options=options())).tensors) == 1
    assert SECRET not in caplog.text.lower()


def options(**fields: Any) -> pb.EmbedOptions:
    return pb.EmbedOptions(**{"outputs": [pb.Output(pooled_vectors=pb.PooledVectors())]} | fields)


def opening(asked: pb.EmbedOptions | None = None, order: int = 0) -> pb.EmbedStreamRequest:
    return pb.EmbedStreamRequest(options=pb.StreamOptions(options=asked or options(), order=order))


def texts(*ids: int) -> pb.EmbedStreamRequest:
    inputs = [pb.StreamInput(id=number, input=pb.Input(text=SECRET)) for number in ids]
    return pb.EmbedStreamRequest(inputs=pb.StreamInputs(inputs=inputs))


def failures(responses: Any) -> list[pb.StreamFailure]:
    return [failure for response in responses for failure in response.results.failures]


def stream_refused(stub: Stub, messages: list[pb.EmbedStreamRequest], *named: str) -> None:
    raw_refused(INVALID, lambda: list(stub.EmbedStream(iter(messages))), *named)


def embeds(stub: Stub, inputs: list[pb.Input], asked: pb.EmbedOptions) -> list[Any]:
    """Returns the calls of the two RPCs that embed one request."""
    return [
        lambda: stub.Embed(pb.EmbedRequest(inputs=inputs, options=asked)),
        lambda: list(stub.EmbedLayers(pb.EmbedLayersRequest(inputs=inputs, options=asked))),
    ]


def test_options_that_the_contract_does_not_know_are_refused_before_inputs(stub: Stub) -> None:
    wrong, named = options(truncation=99), ("truncation", "99")
    for inputs in ([pb.Input(text=SECRET)], [pb.Input()], [], [pb.Input(text=SECRET)] * 1001):
        for call in embeds(stub, inputs, wrong):
            raw_refused(INVALID, call, *named)
    stream_refused(stub, [opening(wrong), texts(0)], *named)


def test_too_many_texts_in_one_message(stub: Stub) -> None:
    inputs = [pb.Input(text=SECRET)] * 1001
    tokenize = lambda: stub.Tokenize(pb.TokenizeRequest(inputs=inputs))  # noqa: E731
    raw_refused(INVALID, tokenize, "1001", "1000")


def test_a_stream_takes_any_number_of_texts_in_one_message(stub: Stub) -> None:
    answers = stub.EmbedStream(iter([opening(), texts(*range(1001))]), timeout=60)
    ids = [number for answer in answers for number in answer.results.ids]
    assert ids == list(range(1001))


def test_an_answer_too_large_for_embed(stub: Stub) -> None:
    asked = options(outputs=[ALL_LAYERS])
    request = pb.EmbedRequest(inputs=[pb.Input(text="paris " * 510)] * 17, options=asked)
    raw_refused(
        INVALID,
        lambda: stub.Embed(request),
        "Embed",
        str((4 << 20) - (64 << 10)),
        "EmbedLayers",
    )
    request = pb.EmbedRequest(inputs=[pb.Input(text="paris " * 510)] * 15, options=asked)
    assert len(stub.Embed(request).tensors) == 4


def test_rows_of_words_count_against_the_limit_of_an_answer(stub: Stub) -> None:
    # Two tokens, and a row for each of 20000 words: what must be held is known before anything is computed.
    words = pb.Input(words=pb.Words(words=[""] * 20_000))
    asked = options(outputs=[pb.Output(word_vectors=pb.WordVectors(all_layers=True))])
    raw_refused(INVALID, lambda: stub.Embed(pb.EmbedRequest(inputs=[words], options=asked)), "Embed", "EmbedLayers")


def test_enums_that_the_contract_does_not_know(stub: Stub) -> None:
    stream_refused(stub, [opening(order=99), texts(0)], "order", "99")
    request = pb.TokenizeRequest(inputs=[pb.Input(text=SECRET)], truncation=99)
    raw_refused(INVALID, lambda: stub.Tokenize(request), "truncation", "99")


def test_an_input_without_kind(stub: Stub) -> None:
    inputs = [pb.Input(text=SECRET), pb.Input()]
    tokenize = lambda: stub.Tokenize(pb.TokenizeRequest(inputs=inputs))  # noqa: E731
    for call in (*embeds(stub, inputs, options()), tokenize):
        raw_refused(INVALID, call, "inputs[1]", "kind", "text, pair, words or token_ids")
    messages = [opening(), pb.EmbedStreamRequest(inputs=pb.StreamInputs(inputs=[pb.StreamInput(id=7)]))]
    (failure,) = failures(stub.EmbedStream(iter(messages)))
    assert (failure.id, failure.code) == (7, StatusCode.INVALID_ARGUMENT)
    check_message(failure.message, "item 7", "kind")


def test_requests_without_inputs(stub: Stub) -> None:
    for call in (*embeds(stub, [], options()), lambda: stub.Tokenize(pb.TokenizeRequest())):
        raw_refused(INVALID, call, "inputs is empty", "at least one")
    raw_refused(INVALID, lambda: stub.Decode(pb.DecodeRequest()), "texts is empty", "at least one")
    nothing = pb.EmbedStreamRequest(inputs=pb.StreamInputs())
    (header,) = stub.EmbedStream(iter([opening(), nothing, nothing]), timeout=60)
    assert header.HasField("header")


def test_no_words_are_the_empty_text(stub: Stub) -> None:
    request = pb.TokenizeRequest(inputs=[pb.Input(words=pb.Words())])
    assert list(stub.Tokenize(request).texts[0].tokens) == ["[CLS]", "[SEP]"]


@pytest.mark.parametrize("rpc", ["GetModelInfo", "Tokenize", "Decode", "Embed", "EmbedLayers", "EmbedStream"])
def test_bytes_that_are_no_request(channel: grpc.Channel, stub: Stub, rpc: str) -> None:
    path = f"/layertap.v1.EmbeddingService/{rpc}"
    # A field of ten bytes that ends after one, and text that is no UTF-8.
    garbage = [b"\x0a\xff" + SECRET.encode()]
    if rpc != "GetModelInfo":
        garbage.append(
            pb.EmbedRequest(inputs=[pb.Input(text=SECRET)]).SerializeToString().replace(b"xyz", b"\xff\xfe\xfd")
        )
    for raw in garbage if rpc in ("Tokenize", "Embed", "EmbedLayers") else garbage[:1]:
        if rpc == "EmbedStream":
            call = lambda raw=raw: list(channel.stream_stream(path, None, None)(iter([raw]), timeout=PATIENCE_S))  # noqa: E731
        elif rpc == "EmbedLayers":
            call = lambda raw=raw: list(channel.unary_stream(path, None, None)(raw, timeout=PATIENCE_S))  # noqa: E731
        else:
            call = lambda raw=raw: channel.unary_unary(path, None, None)(raw, timeout=PATIENCE_S)  # noqa: E731
        raw_refused(INVALID, call, f"{rpc}Request", "contract")


def test_an_rpc_that_is_none(channel: grpc.Channel, stub: Stub) -> None:
    call = channel.unary_unary("/layertap.v1.EmbeddingService/Nothing", None, None)
    raw_refused(grpc.StatusCode.UNIMPLEMENTED, lambda: call(b"", timeout=PATIENCE_S))


def test_a_stream_opens_with_its_options_once(stub: Stub) -> None:
    stream_refused(stub, [texts(0)], "first message", "options")
    stream_refused(stub, [], "first message", "options")
    stream_refused(stub, [pb.EmbedStreamRequest()], "first message", "options")
    stream_refused(stub, [opening(), opening()], "options", "inputs")
    stream_refused(stub, [opening(), texts(0), opening()], "options", "inputs")
    stream_refused(stub, [opening(), pb.EmbedStreamRequest()], "inputs")


def test_ids_that_are_in_flight_twice(stub: Stub) -> None:
    stream_refused(stub, [opening(), texts(3, 5, 3)], "id 3", "anew")
    # Answered ids may come again: a caller that waits for the answer can number from 0 each time.
    answered = threading.Event()

    def messages() -> Iterator[pb.EmbedStreamRequest]:
        yield opening()
        yield texts(3)
        assert answered.wait(PATIENCE_S)
        yield texts(3)

    ids = []
    for response in stub.EmbedStream(messages()):
        ids += response.results.ids
        if ids:
            answered.set()
    assert ids == [3, 3]


def test_cancelled_calls_leave_the_server_well(stub: Stub) -> None:
    inputs = [pb.Input(text="paris " * 500)] * 500
    asked = options(outputs=[ALL_LAYERS])
    unary = stub.bare.Embed.future(pb.EmbedRequest(inputs=inputs, options=options()))
    unary.cancel()
    assert unary.cancelled()
    rows = stub.EmbedLayers(pb.EmbedLayersRequest(inputs=inputs, options=asked))
    assert next(rows).WhichOneof("part") == "header"
    rows.cancel()
    raw_refused(grpc.StatusCode.CANCELLED, lambda: list(rows))
    stream = stub.EmbedStream(itertools.chain([opening(asked)], (texts(n) for n in itertools.count())))
    assert next(stream).WhichOneof("part") == "header"
    assert next(stream).WhichOneof("part") == "results"
    stream.cancel()
    raw_refused(grpc.StatusCode.CANCELLED, lambda: list(stream))
