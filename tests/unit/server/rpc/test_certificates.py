"""The dates of certificates, held against those that `cryptography` wrote."""

from __future__ import annotations

import datetime

import pytest
from support.authority import Authority

from layertap_server.rpc.certificates import Validity, validities

NOW = datetime.datetime.now(datetime.UTC)


def in_days(days: float) -> datetime.datetime:
    return NOW + datetime.timedelta(days=days)


@pytest.mark.parametrize("days", [(-3, 1), (-90, -1), (1, 365), (-20_000, 30_000), (-1 / 24, 1 / 24)])
def test_the_dates_are_those_that_were_signed(days: tuple[float, float]) -> None:
    authority = Authority("x" * 64)
    chain = authority.sign("a" * 64, days=days, hosts=tuple(f"{n}.example" for n in range(500))).cert + authority.pem
    own, root = validities(b"text before\n" + chain)
    signed = datetime.datetime.now(datetime.UTC)
    for found, wanted in ((own.begin, days[0]), (own.end, days[1]), (root.end, 1)):
        assert abs(found - signed - datetime.timedelta(days=wanted)) < datetime.timedelta(minutes=1)


@pytest.mark.parametrize(
    ("begin", "end", "fault", "warning"),
    [
        (-3, 30, "", ""),
        (-80, 6, "", "expires on"),
        (-1, 1, "", ""),  # Made for two days: it will be replaced in time.
        (-1.5, 0.5, "", "expires on"),
        (-3, -1, "has expired on", "has expired on"),
        (1, 3, "is not valid before", ""),
    ],
)
def test_what_is_wrong_and_what_soon_will_be(begin: float, end: float, fault: str, warning: str) -> None:
    found = Validity(in_days(begin), in_days(end))
    assert found.fault(NOW).startswith(fault) and bool(found.fault(NOW)) is bool(fault)
    assert found.warning(NOW).startswith(warning) and bool(found.warning(NOW)) is bool(warning)


@pytest.mark.parametrize("content", ["", "AAAA", "MAA=", "MIIB", "MAMCAQA="])
def test_what_is_no_certificate_is_refused(content: str) -> None:
    with pytest.raises(ValueError, match="has no dates"):
        validities(f"-----BEGIN CERTIFICATE-----\n{content}\n-----END CERTIFICATE-----\n".encode())
    assert validities(content.encode()) == []
