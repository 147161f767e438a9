"""How an error must look: exactly its type, words that help, and none of the user's text."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from layertap.errors import LayertapError
from layertap.v1 import embedding_pb2_grpc

SECRET = "xyzzyplugh"
"""Stands for a user's text: no error and no log may hold it."""

GOOD = "I love Paris"

PATIENCE_S = 15.0
"""How long what must come at once may take on a busy machine."""


class Stub:
    """The generated stub, with a deadline on every call: a test may fail, never hang."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.bare = embedding_pb2_grpc.EmbeddingServiceStub(channel)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return functools.partial(getattr(self.bare, name), timeout=PATIENCE_S)


def refused(kind: type[LayertapError], call: Callable[[], Any], *named: str) -> LayertapError:
    """Checks that a call ends with exactly this error, that it names these words, and that it holds no text."""
    with pytest.raises(LayertapError) as caught:
        call()
    error = caught.value
    assert type(error) is kind
    check_message(error.details, *named)
    assert str(error) == error.details + (f" (request {error.request_id})" if error.request_id else "")
    cause = error.__cause__
    while cause is not None:
        assert SECRET not in str(cause).lower()
        cause = cause.__cause__
    return error


def raw_refused(code: grpc.StatusCode, call: Callable[[], Any], *named: str) -> None:
    """Checks likewise what a call of the stub ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() is code
    check_message(caught.value.details(), *named)


def check_message(message: str, *named: str) -> None:
    """Checks that a message is one short line that names these words, and that it holds no text."""
    for words in named:
        assert words in message, message
    assert SECRET not in message.lower()
    assert "\n" not in message and len(message) < 400
