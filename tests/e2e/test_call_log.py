"""What the log tells of each call, the ids that name calls on both ends, and that no text is ever in it."""

from __future__ import annotations

import contextlib
import json
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from support import Server, open_client, poll, running

from layertap import Client, InvalidArgumentError, UnavailableError
from layertap._protocol.inputs import to_messages
from layertap._protocol.options import embed_options
from layertap.v1 import embedding_pb2 as pb
from layertap.v1 import embedding_pb2_grpc
from layertap_server.observability.call_log import CallLog
from layertap_server.observability.log_format import JsonFormatter, TextFormatter

WAIT_S = 30.0
MARKER = "xyzzymarker"
POOLED = {
    "layers": None,
    "pooler_output": False,
    "pooling": "mean",
    "dtype": "float32",
    "truncation": "error",
    "max_length": None,
    "return_tokens": False,
}


def lines_of(server: Server) -> list[dict[str, Any]]:
    """Returns the lines of a JSON log; whatever is no JSON fails here."""
    return [json.loads(line) for line in server.log.decode().splitlines()]


def calls_of(server: Server) -> list[dict[str, Any]]:
    return [line for line in lines_of(server) if line["message"] == "call ended"]


@pytest.mark.parametrize("sent", ["a", "job-7.item_3", "A/b:c+d=e@f", "0" * 128])
def test_a_plain_request_id_is_kept(sent: str) -> None:
    assert CallLog().open("Embed", client="me", metadata={"x-request-id": sent}).request_id == sent


@pytest.mark.parametrize("sent", [None, "", "-", "0" * 129, "two words", "line\nbreak", 'quo"te', "ünï", b"bytes"])
def test_any_other_request_id_is_replaced_by_one_of_our_own(sent: Any) -> None:
    metadata = {} if sent is None else {"x-request-id": sent}
    made = {CallLog().open("Embed", client="me", metadata=metadata).request_id for _ in range(100)}
    assert len(made) == 100 and sent not in made
    assert all(len(one) == 16 and int(one, 16) >= 0 for one in made)


def log_record(message: str, fields: dict[str, Any] | None = None, error: Exception | None = None) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error else None
    record = logging.LogRecord("layertap_server.x", logging.INFO, __file__, 1, message, (), info)
    if fields is not None:
        record.fields = fields
    return record


def test_text_lines_append_the_fields_and_quote_what_is_not_plain() -> None:
    fields = {"code": "OK", "n": 3, "ms": 0.25, "error": "the queue\nis full", "id": "a=b", "path": '"'}
    line = TextFormatter().format(log_record("call ended", fields))
    assert line.endswith(
        r'INFO layertap_server.x: call ended code=OK n=3 ms=0.25 error="the queue\nis full" id="a=b" path="\""'
    )
    assert "\n" not in line
    assert TextFormatter().format(log_record("plain")).endswith("INFO layertap_server.x: plain")


def test_json_lines_are_one_object_each() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as exc:
        line = JsonFormatter().format(log_record("it failed", {"request_id": "7"}, exc))
    assert "\n" not in line
    found = json.loads(line)
    assert found["traceback"].startswith("Traceback") and found["traceback"].endswith("ValueError: two\nlines")
    assert (found["level"], found["logger"], found["message"]) == ("info", "layertap_server.x", "it failed")
    assert found["request_id"] == "7" and found["time"].endswith("+00:00")
    assert "traceback" not in json.loads(JsonFormatter().format(log_record("fine")))


def test_every_call_is_one_line_with_its_numbers_and_no_text_is_in_the_log(tiny_folder: Path) -> None:
    flags = ("--device", "cpu", "--model-id", str(tiny_folder), "--log-level", "debug", "--log-format", "json")
    bad = f"{MARKER} " * 1000
    with running(*flags) as server:
        with Client(server.address) as client:
            client.tokenize(f"{MARKER} a")
            client.embed([f"{MARKER} {MARKER}", "Hello"], pooling="mean")
            with pytest.raises(InvalidArgumentError) as refused:
                client.embed(["fine", bad], pooling="mean")
            whole = client.embed([f"I love {MARKER}", "Hello"], layers="all")
            results = list(client.embed_stream(["Hello", bad, f"{MARKER} b"], pooling="mean"))
            assert [result.error is None for result in results] == [True, False, True]
        assert server.stop() == 0
        lines, calls = lines_of(server), calls_of(server)
    assert MARKER not in server.log.decode() and b"xyzzy" not in server.log
    assert {"asyncio", "layertap_server.observability.call_log"} <= {line["logger"] for line in lines}  # debug is on
    told = [(call["method"], call["code"], call["text_count"]) for call in calls]
    assert told == [
        ("Tokenize", "OK", 1),
        ("Embed", "OK", 2),
        ("Embed", "INVALID_ARGUMENT", 0),
        ("EmbedLayers", "OK", 2),
        ("EmbedStream", "OK", 2),
    ]
    tokenize, good, failed, layers, stream = calls
    assert {call["level"] for call in calls} == {"info"} and len({call["request_id"] for call in calls}) == 5
    assert all(call["client"] == "127.0.0.1" for call in calls)
    assert all(call["duration_ms"] >= call["tokenize_ms"] for call in calls)
    assert min(call["compute_ms"] for call in (good, layers, stream)) > 0 == tokenize["compute_ms"]
    assert layers["token_count"] == whole.token_counts.sum()
    assert layers["sent_bytes"] > 4 * layers["token_count"] * 32 * 4 and failed["sent_bytes"] == 0
    assert stream["failed_text_count"] == 1 and "error" not in stream and "failed_text_count" not in good
    assert failed["request_id"] == refused.value.request_id and failed["error"] == refused.value.details


@pytest.fixture
def stub(tiny_server: Server) -> Iterator[embedding_pb2_grpc.EmbeddingServiceStub]:
    with grpc.insecure_channel(tiny_server.address) as channel:
        yield embedding_pb2_grpc.EmbeddingServiceStub(channel)


def test_a_server_logs_text_by_default(stub: Any, tiny_server: Server) -> None:
    request = pb.EmbedRequest(inputs=to_messages("x"), options=embed_options(**POOLED))
    stub.Embed(request, metadata=(("x-request-id", "the-text-log"),), timeout=WAIT_S)
    wanted = b" call ended request_id=the-text-log method=Embed code=OK client=127.0.0.1 "
    poll(lambda: wanted in tiny_server.log)


@pytest.mark.parametrize(
    ("sent", "kept"), [("job-7", True), ("two words", False), ("0" * 200, False), (None, False)], ids=str
)
@pytest.mark.parametrize("rpc", ["Embed", "EmbedLayers", "EmbedStream"])
@pytest.mark.parametrize("good", [True, False], ids=["answered", "refused"])
def test_the_request_id_comes_back_with_answers_and_errors(
    stub: Any, sent: str | None, kept: bool, rpc: str, good: bool
) -> None:
    options = embed_options(**POOLED)
    if not good:
        options.outputs[0].pooled_vectors.layer = 99
    metadata = () if sent is None else (("x-request-id", sent),)
    if rpc == "EmbedStream":
        opening = pb.EmbedStreamRequest(options=pb.StreamOptions(options=options))
        call = stub.EmbedStream(iter([opening]), metadata=metadata, timeout=WAIT_S)
    elif rpc == "EmbedLayers":
        request = pb.EmbedLayersRequest(inputs=to_messages("x"), options=options)
        call = stub.EmbedLayers(request, metadata=metadata, timeout=WAIT_S)
    else:
        request = pb.EmbedRequest(inputs=to_messages("x"), options=options)
        call = stub.Embed.future(request, metadata=metadata, timeout=WAIT_S)
    if rpc != "Embed":
        with contextlib.suppress(grpc.RpcError):  # Its code is looked at below.
            list(call)
    code = call.code()
    assert code is (grpc.StatusCode.OK if good else grpc.StatusCode.INVALID_ARGUMENT), call.details()
    found = dict(call.trailing_metadata())["x-request-id"]
    assert found == sent if kept else len(found) == 16 and found != sent


def test_errors_of_the_server_tell_their_request_and_others_have_none(kind: str, tiny_server: Server) -> None:
    client = open_client(kind, tiny_server.address)
    found = []
    for call in (
        lambda: client.embed("x", layers=[99]),
        lambda: client.embed("x", pooling="mean", max_length=9999),
        lambda: list(client.embed_stream(["x"], layers=[99])),
        lambda: client.decode([10**6]),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            call()
        found.append(caught.value.request_id)
        assert str(caught.value) == f"{caught.value.details} (request {found[-1]})"
        copy = pickle.loads(pickle.dumps(caught.value))
        assert (str(copy), copy.request_id) == (str(caught.value), found[-1])
    assert len(set(found)) == len(found) and None not in found
    client.close()
    client = open_client(kind, "127.0.0.1:1")
    with pytest.raises(UnavailableError) as caught:
        client.embed("x", timeout_s=WAIT_S)
    assert caught.value.request_id is None and "request" not in str(caught.value)
    client.close()
