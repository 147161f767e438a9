"""Tokens: what their file may say, and which client a token belongs to."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from layertap.errors import UnauthenticatedError
from layertap_server.rpc.auth import Tokens, authenticate, certificate_name, read_tokens

ONE, OTHER, THIRD = "0123456789abcdef", "fedcba9876543210", "x" * 64


def test_a_token_has_a_name_and_a_name_may_have_several() -> None:
    found = Tokens(f"# remarks\n\nalice {ONE}\n  bob:{OTHER}  \nalice:\t{THIRD}\n")
    assert [found.name_of(one) for one in (ONE, OTHER, THIRD)] == ["alice", "bob", "alice"]
    for wrong in ("", ONE[:-1], ONE + "0", ONE.upper(), "alice", "é"):
        assert found.name_of(wrong) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no token"]),
        ("# nothing but a remark\n", ["no token"]),
        (f"alice {ONE}\nsecretwithoutname\n", ["line 2", "name token"]),
        (f"alice {ONE} surplus\n", ["line 1", "name token"]),
        ("alice short\n", ["line 1", "fewer than 16", "openssl"]),
        (f"alice {'x' * 5000}\n", ["line 1", "more than 4096", "openssl"]),
        (f"al\x1bice {ONE}\n", ["line 1", "name token"]),
        (f"alice {ONE}\r\n\r\nbob\u2028\r\n", ["line 3", "name token"]),
        (f"alice {ONE}\nbob {ONE}\n", ["line 2", "second name"]),
    ],
)
def test_a_bad_file_is_refused_by_its_line_and_never_repeated(text: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match="token") as caught:
        Tokens(text)
    assert all(word in str(caught.value) for word in words)
    assert not any(secret in str(caught.value) for secret in (ONE, "secretwithoutname", "short", "surplus"))


def test_a_byte_order_mark_and_ends_of_lines_of_windows_are_no_part_of_a_token(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(f"alice {ONE}\r\nbob:{OTHER}\r\n".encode("utf-8-sig"))
    found = read_tokens(str(path))
    assert found.name_of(ONE) == "alice" and found.name_of(OTHER) == "bob"


@pytest.mark.parametrize(("content", "line"), [(f"alice {ONE}\n".encode("utf-16"), 1), (b"# a\n\nbob \xff\n", 3)])
def test_a_file_that_is_no_utf_8_is_refused_by_its_line(tmp_path: Path, content: bytes, line: int) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^line {line} is not UTF-8; save the file as UTF-8$") as caught:
        read_tokens(str(path))
    assert caught.value.__cause__ is None


def test_reading_and_finding_tokens_takes_no_longer_for_each_where_there_are_many() -> None:
    text = "".join(f"client-{n} {n:032}\n" for n in range(100_000))
    started = time.process_time()
    found = Tokens(text)
    assert found.name_of(f"{99_999:032}") == "client-99999"
    assert time.process_time() - started < 10  # Comparing each with all others would take an hour.
    started = time.process_time()
    assert [found.name_of(f"{n:032}") for n in (0, 50_000, 100_000)] == ["client-0", "client-50000", None]
    assert time.process_time() - started < 0.01


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, False), (0o644, True)])
def test_a_file_that_everybody_can_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, warned: bool
) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"alice {ONE}\n")
    path.chmod(mode)
    assert read_tokens(str(path)).name_of(ONE) == "alice"
    assert ("chmod" in caplog.text) is warned and ONE not in caplog.text


def test_a_bearer_token_tells_whose_call_it_is() -> None:
    tokens = Tokens("alice alices-token-0123")
    assert (
        authenticate(tokens, "Bearer alices-token-0123")
        == authenticate(tokens, "bearer  alices-token-0123 ")
        == "alice"
    )
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer other-token-01234",
        "Basic alices-token-0123",
        b"Bearer alices-token-0123",
    ):
        with pytest.raises(UnauthenticatedError):
            authenticate(tokens, wrong)


@pytest.mark.parametrize(
    ("certificate", "name"),
    [
        ({}, None),
        ({"subject": ((("countryName", "NL"),), (("commonName", "alice"),))}, "alice"),
        (
            {"subject": ((("commonName", ""),),), "subjectAltName": (("DNS", "alice.example"), ("DNS", "b"))},
            "alice.example",
        ),
        ({"subject": (), "subjectAltName": ()}, None),
    ],
)
def test_a_certificate_names_its_client_by_its_common_name_else_another(certificate: Any, name: str | None) -> None:
    assert certificate_name(certificate) == name
