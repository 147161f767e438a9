"""What keeps the log safe: metadata that other libraries format, errors that peers cause, control characters."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import pytest

from layertap_server.observability.log_format import JsonFormatter, PeerFilter, TextFormatter, hide_metadata

SECRET = "secret-of-alice"


def record(name: str, message: str, *args: object, level: int = logging.ERROR) -> logging.LogRecord:
    """Returns a record made while an exception is handled, as libraries do."""
    try:
        raise ValueError(f"cannot decode {SECRET}")
    except ValueError:
        return logging.LogRecord(name, level, __file__, 1, message, args, sys.exc_info())


@pytest.mark.parametrize("name", ["grpc", "grpc._cython.cygrpc", "grpc.aio._call", "opentelemetry.util.re"])
@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()], ids=["text", "json"])
def test_what_grpc_formats_is_not_logged_but_the_place_of_a_fault_is(name: str, formatter: logging.Formatter) -> None:
    for made in (record(name, "Invalid encoding on %s", SECRET), record(name, f"it has {SECRET}")):
        assert hide_metadata(made)
        line = formatter.format(made)
        assert SECRET not in line and "\n" not in line
        assert f"{name} reports a fault: ValueError in record (test_log_format.py:" in line
    assert not hide_metadata(record(name, "sends %s", SECRET, level=logging.DEBUG))


@pytest.mark.parametrize("name", ["grpcio", "layertap_server.rpc", "opentelemetry.sdk.trace"])
def test_the_lines_of_other_loggers_are_left_as_they_are(name: str) -> None:
    made = record(name, "found %s", "it")
    assert hide_metadata(made) and made.getMessage() == "found it" and made.exc_info


def test_a_logger_that_peers_can_make_write_has_one_line_a_minute_and_says_how_many_it_left_out() -> None:
    now = 100.0
    peers = PeerFilter(clock=lambda: now)

    def passed(name: str, level: int = logging.ERROR) -> Any:
        made = record(name, "it failed", level=level)
        return getattr(made, "fields", {}).get("left_out_count", 0) if peers.filter(made) else None

    assert passed("grpc._cython.cygrpc") == 0
    assert [passed("grpc.aio") for _ in range(1000)] == [None] * 1000
    assert passed("asyncio") == 0 and passed("asyncio") is None
    assert passed("asyncio", logging.DEBUG) == 0
    assert [passed("layertap_server.rpc") for _ in range(10)] == [0] * 10
    now += 60
    assert passed("grpc") == 1000 and passed("grpc") is None and passed("asyncio") == 1
    now += 60
    assert passed("grpc") == 1


@pytest.mark.parametrize("character", ["\n", "\r", "\x1b", "\x7f", "\x9b", "\u2028", "\u202e", "\udc80", "\0"])
def test_control_characters_are_escaped(character: str) -> None:
    made = logging.LogRecord("layertap_server", logging.INFO, __file__, 1, f"model a{character}b", (), None)
    made.fields = {"name": f"c{character}d"}
    line = TextFormatter().format(made)
    assert character not in line and line.endswith(f"name={json.dumps(f'c{character}d')}"), line
    found = JsonFormatter().format(made)
    assert character not in found and json.loads(found)["name"] == f"c{character}d"


def test_a_traceback_has_no_control_characters_but_the_ends_of_its_lines() -> None:
    try:
        raise ValueError("red \x1b[31m\r\nline")
    except ValueError as exc:
        made = logging.LogRecord("x", logging.ERROR, __file__, 1, "it failed", (), (type(exc), exc, exc.__traceback__))
    text = TextFormatter().format(made)
    assert text.splitlines()[-2:] == [r"ValueError: red \x1b[31m\r", "line"]
