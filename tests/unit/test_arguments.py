"""Arguments of both clients: what is wrong with them is raised by the call itself, before anything connects."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from layertap import AsyncClient, Client, InvalidArgumentError

NOWHERE = "127.0.0.1:1"


@pytest.fixture(params=[Client, AsyncClient])
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Calls a method; of an iterator nothing is asked, so that what is raised is raised by the call."""

    def made(method: str, *args: Any, **kwargs: Any) -> Any:
        found = getattr(request.param(NOWHERE), method)(*args, **kwargs)
        return asyncio.run(found) if inspect.iscoroutine(found) else found

    return made


WRONG: list[dict[str, Any]] = [{"dtype": "float23"}, {"layers": "al"}, {"max_length": 0}, {"truncation": "rigth"}]


@pytest.mark.parametrize("options", WRONG, ids=str)
@pytest.mark.parametrize("method", ["embed", "embed_layers", "embed_stream"])
def test_wrong_options_raise_at_the_call(call: Callable[..., Any], method: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        call(method, ["x"], **options)


@pytest.mark.parametrize("method", ["tokenize", "embed", "embed_layers", "embed_stream", "encode"])
def test_unknown_options_are_named_with_those_that_there_are(call: Callable[..., Any], method: str) -> None:
    with pytest.raises(TypeError, match=r"'poling'.*(max_length|prompt|truncate_dim)"):
        call(method, ["x"], poling="mean")


@pytest.mark.parametrize("inputs", ["one text", 7, b"x", {"a": "b"}])
def test_inputs_that_are_no_iterable_of_texts_raise_at_the_call_of_a_stream(
    call: Callable[..., Any], inputs: Any
) -> None:
    with pytest.raises(InvalidArgumentError, match="inputs"):
        call("embed_stream", inputs)


def test_wrong_inputs_and_on_error_raise_at_the_call(call: Callable[..., Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"inputs\[1\]"):
        call("embed_layers", ["x", None])
    with pytest.raises(InvalidArgumentError, match="on_error"):
        call("embed_stream", ["x"], on_error="rase")
