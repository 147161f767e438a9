"""OpenAI's JSON: what is read, what is refused, and the bits of the answer."""

from __future__ import annotations

import base64
import json
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layertap.errors import (
    InternalError,
    InvalidArgumentError,
    LayertapError,
    NotFoundError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)
from layertap_server.compat import openai_messages as messages

MODEL = "a-model"
SECRET = "s3cret"


def read(request: object) -> messages.EmbeddingsRequest:
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    return messages.read_request(body, model_id=MODEL, max_text_count=3)


def test_a_string_and_a_list_of_strings_are_texts() -> None:
    assert read({"model": MODEL, "input": "one"}).texts == ["one"]
    found = read({"input": ["one", "", "zwei\n\u2028 😀"], "model": MODEL, "user": "u", "encoding_format": "base64"})
    assert (found.texts, found.is_base64, found.dimensions) == (["one", "", "zwei\n\u2028 😀"], True, 0)
    found = read({"input": "x", "model": MODEL, "dimensions": 7, "encoding_format": "float"})
    assert (found.is_base64, found.dimensions) == (False, 7)
    nothing = {"dimensions": None, "encoding_format": None, "user": None}
    assert read({"input": "x", "model": MODEL, **nothing}).dimensions == 0


@given(
    texts=st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=3),
    indent=st.sampled_from([None, 0, 2]),
    ensure_ascii=st.booleans(),
)
def test_whatever_json_says_of_strings_is_read_as_python_reads_it(
    texts: list[str], indent: int | None, ensure_ascii: bool
) -> None:
    body = json.dumps({"model": MODEL, "input": texts}, indent=indent, ensure_ascii=ensure_ascii)
    assert read(body.encode()).texts == texts


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "should begin an object"),
        (b"[]", "should begin an object"),
        (b"{", "should begin a field's name"),
        (b'{"input": "s3cret"', "should begin a comma"),
        (b'{"input" "s3cret"}', "should begin a colon"),
        (b'{"input": "s3cret}', "should begin"),
        (b'{"input": "s3cret",}', "should begin a field's name"),
        (b'{"input": "s3cret"} x', "should begin nothing"),
        (b'{"input": ["s3cret"', "should begin a comma"),
        (b'{"input": ["s3cret",]}', r"input\[1\] is not a string"),
        (b'{"input": "a\xff"}', "not UTF-8: its byte 12"),
        (b'{"input": "\\ud800"}', "half a surrogate pair"),
        (b'{"input": "s3cret", "input": "s3cret"}', "input is there twice"),
        (b'{"s3cret": 1}', "a field that this server does not know"),
        (b'{"model": "a-model"}', "input is missing"),
        (b'{"model": "a-model", "input": null}', "input is not a string"),
        (b'{"model": "a-model", "input": []}', "input is an empty list"),
        (b'{"model": "a-model", "input": {}}', "input is not a string"),
        (b'{"model": "a-model", "input": ["s3cret", null]}', r"input\[1\] is not a string"),
        (b'{"model": "a-model", "input": ["a", "b", "c", "d"]}', "more than 3 texts"),
        (b'{"model": "a-model", "input": [1, 2]}', "check_embedding_ctx_length=False"),
        (b'{"model": "a-model", "input": [[1, 2]]}', "check_embedding_ctx_length=False"),
        (b'{"model": "a-model", "input": [["s3cret"]]}', r"input\[0\] is not a string"),
        (b'{"model": "a-model", "input": [[', r"input\[0\] is not a string"),
        (b'{"input": "s3cret"}', "model is missing"),
        (b'{"input": "s3cret", "model": 3}', "model is missing or not a string"),
        (b'{"input": "s3cret", "model": []}', "model is a list or an object"),
        (b'{"input": "s3cret", "model": "a-model", "encoding_format": "int8"}', "encoding_format"),
        (b'{"input": "s3cret", "model": "a-model", "dimensions": 0}', "dimensions"),
        (b'{"input": "s3cret", "model": "a-model", "dimensions": true}', "dimensions"),
        (b'{"input": "s3cret", "model": "a-model", "dimensions": 1.0}', "dimensions"),
        (b'{"input": "s3cret", "model": "a-model", "dimensions": "7"}', "dimensions"),
        (b'{"input": "s3cret", "model": "a-model", "dimensions": NaN}', "dimensions"),
        (b'{"input": "s3cret", "model": "a-model", "dimensions": ' + b"9" * 5000 + b"}", "should begin dimensions"),
        (b'{"input": "s3cret", "model": "a-model", "user": 3}', "user"),
    ],
)
def test_what_is_no_request_is_refused_by_name_and_without_its_text(body: bytes, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words) as caught:
        read(body)
    assert SECRET not in caught.value.details and messages.status(caught.value) == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["input", MODEL, "base64"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["input", "model", "dimensions", "x"]), inner),
)


@given(
    JSON.map(lambda value: json.dumps(value).encode())
    | st.binary()
    | st.binary().map(lambda tail: b'{"input":["' + tail)
)
def test_whatever_is_sent_is_read_or_refused(body: bytes) -> None:
    try:
        found = read(body)
    except LayertapError as exc:
        assert messages.status(exc) in (400, 404)
    else:
        assert json.loads(body)["input"] in (found.texts, found.texts[0])


def test_deep_and_long_lists_are_refused_at_their_first_bracket() -> None:
    for inside in (b"[" * 10_000_000, b"[]," * 3_000_000, b"{},", b"1," * 5_000_000):
        started = time.process_time()
        with pytest.raises(InvalidArgumentError):
            read(b'{"model": "a-model", "input": [' + inside)
        assert time.process_time() - started < 0.5, "it was read to its end"


def test_another_model_is_not_found() -> None:
    with pytest.raises(NotFoundError, match=MODEL) as caught:
        read({"model": SECRET, "input": "x"})
    assert messages.status(caught.value) == 404 and SECRET not in caught.value.details
    assert json.loads(messages.error_body(caught.value))["error"]["code"] == "model_not_found"


def test_an_answer_has_the_bits_of_its_vectors() -> None:
    vectors = np.random.default_rng(0).standard_normal((700, 32), np.float32)
    vectors[0, :4] = 0.1, -0.0, 1e-45, 3.4e38
    for is_base64 in (False, True):
        parts = list(messages.answer(vectors, is_base64=is_base64, model_id='a"b', token_count=9))
        assert len(parts) > 2, "a large answer is made in parts"
        found = json.loads(b"".join(parts))
        assert (found["object"], found["model"]) == ("list", 'a"b')
        assert found["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
        assert [(item["object"], item["index"]) for item in found["data"]] == [("embedding", n) for n in range(700)]
        rows = [item["embedding"] for item in found["data"]]
        got = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows] if is_base64 else np.array(rows, np.float64)
        assert np.array_equal(np.asarray(got), vectors)
    messages.check_finite(vectors)
    vectors[-1, -1] = np.nan
    with pytest.raises(InvalidArgumentError, match="base64"):
        messages.check_finite(vectors)


@pytest.mark.parametrize(
    ("error", "status", "kind", "headers"),
    [
        (InvalidArgumentError("no"), 400, "invalid_request_error", {}),
        (messages.RequestTooLargeError("no"), 413, "invalid_request_error", {}),
        (messages.MethodError("POST", "no"), 405, "invalid_request_error", {"allow": "POST"}),
        (NotFoundError("no"), 404, "invalid_request_error", {}),
        (UnauthenticatedError("no"), 401, "authentication_error", {"www-authenticate": "Bearer"}),
        (
            ResourceExhaustedError("no", retry_after_s=0.5),
            429,
            "rate_limit_error",
            {"retry-after": "1", "retry-after-ms": "500"},
        ),
        (
            UnavailableError("no", retry_after_s=1.0),
            503,
            "server_error",
            {"retry-after": "1", "retry-after-ms": "1000"},
        ),
        (InternalError("no"), 500, "server_error", {}),
    ],
)
def test_errors_have_the_status_and_the_form_of_the_api(
    error: LayertapError, status: int, kind: str, headers: dict[str, str]
) -> None:
    assert (messages.status(error), messages.error_headers(error)) == (status, headers)
    found = json.loads(messages.error_body(error))["error"]
    assert found == {"message": "no", "type": kind, "param": None, "code": error.code.name.lower()}


def test_the_error_of_a_field_names_it() -> None:
    assert json.loads(messages.error_body(messages.FieldError("input", "no")))["error"]["param"] == "input"


def test_models_are_listed() -> None:
    one = {"id": MODEL, "object": "model", "created": 5, "owned_by": "layertap"}
    assert json.loads(messages.models(MODEL, created=5, is_list=True)) == {"object": "list", "data": [one]}
    assert json.loads(messages.models(MODEL, created=5, is_list=False)) == one
