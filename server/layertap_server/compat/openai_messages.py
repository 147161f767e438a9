"""What OpenAI's API says: requests for embeddings read from JSON, and answers and errors as JSON.

Pure: bytes in, bytes out. A request is read value by value, because a general parser makes objects of whatever is sent,
twenty times the size of its text, before any of it can be refused. Field names are facts of that API.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final, NoReturn

from layertap.errors import InvalidArgumentError, LayertapError, NotFoundError, StatusCode
from layertap.sentence_vectors import Vectors

_SPACE: Final = re.compile(r"[ \t\n\r]*")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_VALUES: Final = json.JSONDecoder()
_NUMBERS: Final = json.JSONEncoder(allow_nan=False, separators=(",", ":"))
_SCALARS: Final = '"-0123456789tfnNI'
"""What a value begins with that is neither a list nor an object. N and I are those of NaN and Infinity."""

_FIELDS: Final = ("input", "model", "encoding_format", "dimensions", "user")
_TOKEN_IDS: Final = (
    "input has token ids, which are those of another model's vocabulary; send strings "
    "(in LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False))"
)
_PART_VALUES: Final = 16 << 10
"""Values of one part of an answer, at least one vector."""

_STATUSES: Final = {
    StatusCode.INVALID_ARGUMENT: 400,
    StatusCode.FAILED_PRECONDITION: 400,
    StatusCode.OUT_OF_RANGE: 400,
    StatusCode.UNAUTHENTICATED: 401,
    StatusCode.PERMISSION_DENIED: 403,
    StatusCode.NOT_FOUND: 404,
    StatusCode.DEADLINE_EXCEEDED: 408,
    StatusCode.RESOURCE_EXHAUSTED: 429,
    StatusCode.UNAVAILABLE: 503,
}
_KINDS: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
"""The type of an error by its status; other errors below 500 are the request's, the rest the server's."""


class RequestTooLargeError(InvalidArgumentError):
    """The body of a request has too many bytes."""


class MethodError(InvalidArgumentError):
    """The path knows another method than the request's."""

    def __init__(self, method: str, details: str) -> None:
        super().__init__(details)
        self.method = method


class FieldError(InvalidArgumentError):
    """A field of a request is at fault."""

    def __init__(self, field: str, details: str) -> None:
        super().__init__(details)
        self.field = field


class ModelNotFoundError(NotFoundError):
    """The server has another model than the request asks for."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingsRequest:
    """A request for one vector of each text.

    Attributes:
        is_base64: Whether vectors are answered as base64 of their bytes, not as numbers.
        dimensions: How many values of each vector are kept; 0: as the model's folder says.
    """

    texts: Sequence[str]
    is_base64: bool
    dimensions: int


def read_request(body: bytes, *, model_id: str, max_text_count: int) -> EmbeddingsRequest:
    """Reads the JSON of a request for embeddings, which must name the model.

    Raises:
        ModelNotFoundError: if it names another model.
        InvalidArgumentError: if it is no such request; the message names the field and nothing of its value.
    """
    try:
        fields = _Reader(body.decode(), max_text_count).read()
    except UnicodeDecodeError as exc:
        raise InvalidArgumentError(f"the body is not UTF-8: its byte {exc.start} is no character; encode it") from exc
    if "input" not in fields:
        raise FieldError("input", "input is missing; send a string or a list of strings")
    model = fields.get("model")
    if not isinstance(model, str):
        raise FieldError("model", f"model is missing or not a string; send {model_id}, the model of this server")
    if model != model_id:
        raise ModelNotFoundError(f"this server has no model of that name; send {model_id}, which GET /v1/models lists")
    encoding = fields.get("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise FieldError("encoding_format", "encoding_format is neither float nor base64; send one of them")
    dimensions = fields.get("dimensions")
    if dimensions is not None and (type(dimensions) is not int or dimensions < 1):
        raise FieldError("dimensions", "dimensions is no whole number from 1; send one, or leave it out")
    if not isinstance(fields.get("user", ""), str | None):
        raise FieldError("user", "user is not a string; send one, or leave it out")
    return EmbeddingsRequest(texts=fields["input"], is_base64=encoding == "base64", dimensions=dimensions or 0)


class _Reader:
    """Reads the one JSON object that a request is, from left to right."""

    def __init__(self, text: str, max_text_count: int) -> None:
        self._text = text
        self._position = 0
        self._max_text_count = max_text_count

    def read(self) -> dict[str, Any]:
        """Returns the fields, `input` as a list of strings."""
        fields: dict[str, Any] = {}
        self._expect("{", "an object with input and model")
        while not self._skip("}"):
            if fields:
                self._expect(",", "a comma between fields")
            name = self._scalar("a field's name")
            if name not in _FIELDS:
                raise InvalidArgumentError(
                    f"the request has a field that this server does not know; leave out all but {', '.join(_FIELDS)}"
                )
            if name in fields:
                raise FieldError(name, f"{name} is there twice; send it once")
            self._expect(":", "a colon after a field's name")
            fields[name] = self._texts() if name == "input" else self._scalar(name, name)
        if self._peek():
            self._fail("nothing after the object")
        return fields

    def _texts(self) -> list[str]:
        if not self._skip("["):
            return [self._string()]
        texts: list[str] = []
        while not self._skip("]"):
            if texts:
                self._expect(",", "a comma between texts")
            if len(texts) == self._max_text_count:
                raise FieldError(
                    "input",
                    f"input has more than {self._max_text_count} texts, the most of one request; send it in several",
                )
            texts.append(self._string(len(texts)))
        if not texts:
            raise FieldError("input", "input is an empty list; send at least one string")
        return texts

    def _string(self, index: int | None = None) -> str:
        first = self._peek()
        if first == '"':
            text = self._scalar("a string", "input")
            if _SURROGATE.search(text):
                raise FieldError("input", "input has half a surrogate pair, which is no character; leave it out")
            return str(text)
        if index is not None and self._skip("["):  # No farther: a body may be brackets alone.
            first = self._peek()
        if index is not None and first and first in "-0123456789":
            raise FieldError("input", _TOKEN_IDS)
        where = "input" if index is None else f"input[{index}]"
        raise FieldError("input", f"{where} is not a string; send a string or a list of strings")

    def _scalar(self, what: str, field: str = "") -> Any:
        first = self._peek()
        if field and first in ("{", "["):
            raise FieldError(field, f"{field} is a list or an object; send a single value")
        if not first or first not in _SCALARS:
            self._fail(what)
        try:
            value, self._position = _VALUES.raw_decode(self._text, self._position)
        except ValueError as exc:
            self._fail(what, exc)
        return value

    def _peek(self) -> str:
        found = _SPACE.match(self._text, self._position)
        assert found is not None
        self._position = found.end()
        return self._text[self._position : self._position + 1]

    def _skip(self, character: str) -> bool:
        if self._peek() != character:
            return False
        self._position += 1
        return True

    def _expect(self, character: str, what: str) -> None:
        if not self._skip(character):
            self._fail(what)

    def _fail(self, what: str, cause: Exception | None = None) -> NoReturn:
        raise InvalidArgumentError(
            f"the body is not the JSON of a request: character {self._position} should begin {what}; correct it"
        ) from cause


def check_finite(vectors: Vectors) -> None:
    """Checks that numbers can be written as JSON."""
    if not math.isfinite(float(vectors.sum(dtype="float64"))):
        raise InvalidArgumentError(
            "a vector has a value that is not finite, which JSON has no number for; ask for base64"
        )


def answer(vectors: Vectors, *, is_base64: bool, model_id: str, token_count: int) -> Iterator[bytes]:
    """Yields the parts of the answer to a request for embeddings.

    Numbers are written as float64 and so to the last bit of their float32; as base64 vectors are their bytes,
    little-endian. Shape of the vectors: [text_count, dimensions].
    """
    rows = vectors.astype("<f4", copy=False)
    head = '{"object":"list","data":['
    count = max(1, _PART_VALUES // rows.shape[1])
    for first in range(0, len(rows), count):
        items = []
        for index, row in enumerate(rows[first : first + count], first):
            shown = f'"{base64.b64encode(row).decode()}"' if is_base64 else _NUMBERS.encode(row.tolist())
            items.append(f'{{"object":"embedding","index":{index},"embedding":{shown}}}')
        yield (head + ",".join(items)).encode()
        head = ","
    usage = f'"usage":{{"prompt_tokens":{token_count},"total_tokens":{token_count}}}'
    yield f'],"model":{json.dumps(model_id)},{usage}}}'.encode()


def models(model_id: str, *, created: int, is_list: bool) -> bytes:
    """Returns what the API says of the one model, or the list of it."""
    model = {"id": model_id, "object": "model", "created": created, "owned_by": "layertap"}
    return json.dumps({"object": "list", "data": [model]} if is_list else model).encode()


def status(error: LayertapError) -> int:
    """Returns the HTTP status of an error."""
    if isinstance(error, RequestTooLargeError):
        return 413
    return 405 if isinstance(error, MethodError) else _STATUSES.get(error.code, 500)


def error_body(error: LayertapError) -> bytes:
    """Returns an error in the form of the API."""
    number = status(error)
    shown = {
        "message": error.details,
        "type": _KINDS.get(number, "invalid_request_error" if number < 500 else "server_error"),
        "param": error.field if isinstance(error, FieldError) else None,
        "code": "model_not_found" if isinstance(error, ModelNotFoundError) else error.code.name.lower(),
    }
    return json.dumps({"error": shown}).encode()


def error_headers(error: LayertapError) -> dict[str, str]:
    """Returns the headers that HTTP asks for with an error's status, and those that say when to try again."""
    if isinstance(error, MethodError):
        return {"allow": error.method}
    if error.code is StatusCode.UNAUTHENTICATED:
        return {"www-authenticate": "Bearer"}
    if not error.retry_after_s:
        return {}
    return {
        "retry-after": str(math.ceil(error.retry_after_s)),
        "retry-after-ms": str(round(error.retry_after_s * 1000)),
    }
