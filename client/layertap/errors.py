"""What can go wrong, one exception per gRPC status code.

Both ends use these: the server raises them and its service converts them to a status; the client converts
a status back into the same exception. Errors are told apart by type or by `code`, never by their text.

| exception | code | raised when |
|---|---|---|
| `CancelledError` | CANCELLED | the call was cancelled |
| `UnknownError` | UNKNOWN | something between client and server gave no better code |
| `InvalidArgumentError` | INVALID_ARGUMENT | an input or option of the request is wrong or over a limit |
| `DeadlineExceededError` | DEADLINE_EXCEEDED | the answer did not come within `timeout_s` |
| `NotFoundError` | NOT_FOUND | nothing goes by that name |
| `AlreadyExistsError` | ALREADY_EXISTS | it is there already |
| `PermissionDeniedError` | PERMISSION_DENIED | this caller may not do that |
| `ResourceExhaustedError` | RESOURCE_EXHAUSTED | the server is full, or a message is over the transport's limit |
| `FailedPreconditionError` | FAILED_PRECONDITION | the model lacks what was requested, such as a pooler |
| `AbortedError` | ABORTED | the call was given up halfway |
| `OutOfRangeError` | OUT_OF_RANGE | a value does not fit the requested wire dtype |
| `UnimplementedError` | UNIMPLEMENTED | the server does not know this RPC |
| `InternalError` | INTERNAL | a fault of the server |
| `UnavailableError` | UNAVAILABLE | no server answers, or it is starting or stopping |
| `DataLossError` | DATA_LOSS | an answer is incomplete or contradicts itself |
| `UnauthenticatedError` | UNAUTHENTICATED | the credentials are missing or wrong |
"""

from __future__ import annotations

import enum
from typing import ClassVar


class StatusCode(enum.IntEnum):
    """gRPC's status codes by their numbers on the wire."""

    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class LayertapError(Exception):
    """The base of every error that layertap raises on purpose.

    Attributes:
        code: The gRPC status code.
        details: What is wrong, the limit, and the next step; never a text of the caller's.
        retry_after_s: How long to wait before a retry, in seconds: what the server asks, or of a connection that broke
            what it takes to open another. None: the server did not say, or none answers.
        request_id: What the server's log names the call by; None: it was not the server who spoke.
    """

    code: ClassVar[StatusCode] = StatusCode.UNKNOWN

    def __init_subclass__(cls, code: StatusCode | None = None) -> None:
        cls.code = cls.code if code is None else code

    def __init__(self, details: str, *, retry_after_s: float | None = None, request_id: str | None = None) -> None:
        details = printable(details)  # It may have what another server, or the folder of a model, says.
        super().__init__(details)
        self.details = details
        self.retry_after_s = retry_after_s
        self.request_id = None if request_id is None else printable(request_id)

    def __str__(self) -> str:
        return self.details if self.request_id is None else f"{self.details} (request {self.request_id})"


class CancelledError(LayertapError, code=StatusCode.CANCELLED):
    """The call was cancelled."""


class UnknownError(LayertapError, code=StatusCode.UNKNOWN):
    """Something between client and server gave no better code."""


class InvalidArgumentError(LayertapError, code=StatusCode.INVALID_ARGUMENT):
    """An input or option of the request is wrong or over a limit."""


class DeadlineExceededError(LayertapError, code=StatusCode.DEADLINE_EXCEEDED):
    """The answer did not come in time."""


class NotFoundError(LayertapError, code=StatusCode.NOT_FOUND):
    """Nothing goes by that name."""


class AlreadyExistsError(LayertapError, code=StatusCode.ALREADY_EXISTS):
    """It is there already."""


class PermissionDeniedError(LayertapError, code=StatusCode.PERMISSION_DENIED):
    """This caller may not do that."""


class ResourceExhaustedError(LayertapError, code=StatusCode.RESOURCE_EXHAUSTED):
    """The server is full, or a message is over the transport's limit."""


class FailedPreconditionError(LayertapError, code=StatusCode.FAILED_PRECONDITION):
    """The model lacks what was requested."""


class AbortedError(LayertapError, code=StatusCode.ABORTED):
    """The call was given up halfway."""


class OutOfRangeError(LayertapError, code=StatusCode.OUT_OF_RANGE):
    """A value does not fit the requested wire dtype."""


class UnimplementedError(LayertapError, code=StatusCode.UNIMPLEMENTED):
    """The server does not know this RPC."""


class InternalError(LayertapError, code=StatusCode.INTERNAL):
    """A fault of the server."""


class UnavailableError(LayertapError, code=StatusCode.UNAVAILABLE):
    """No server answers, or it is starting or stopping."""


class DataLossError(LayertapError, code=StatusCode.DATA_LOSS):
    """An answer is incomplete or contradicts itself."""


class UnauthenticatedError(LayertapError, code=StatusCode.UNAUTHENTICATED):
    """The credentials are missing or wrong."""


def printable(text: str) -> str:
    """Returns a text in which everything that does not print is escaped, so that it cannot steer a terminal."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Returns a count with its noun, such as "1 text" or "2 texts"; the plural is that with an s by default."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


_BY_CODE: dict[StatusCode, type[LayertapError]] = {kind.code: kind for kind in LayertapError.__subclasses__()}


def from_status(
    code: int, details: str, *, retry_after_s: float | None = None, request_id: str | None = None
) -> LayertapError:
    """Returns the exception for a gRPC status code; an unknown code gives `UnknownError`."""
    try:
        kind = _BY_CODE[StatusCode(code)]
    except ValueError:
        kind = UnknownError
    return kind(details, retry_after_s=retry_after_s, request_id=request_id)
