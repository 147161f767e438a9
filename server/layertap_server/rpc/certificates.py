"""When certificates are valid, read from their DER: Python's `ssl` has the dates of verified certificates alone.

Pure. Knows as much of DER as leads to the two dates.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import re
from collections.abc import Iterator
from typing import Final

_PEM: Final = re.compile(rb"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----(.+?)-----END ", re.DOTALL)
_VERSION: Final = 0xA0
_UTC_TIME: Final = 0x17
"""The type of a time whose year has two digits; the other has four."""
_WARNED_BEFORE: Final = datetime.timedelta(days=7)


@dataclasses.dataclass(frozen=True, slots=True)
class Validity:
    """The dates of a certificate."""

    begin: datetime.datetime
    end: datetime.datetime

    def fault(self, now: datetime.datetime) -> str:
        """Returns what is wrong with the certificate at a time; empty: nothing."""
        if now > self.end:
            return f"has expired on {_shown(self.end)}; renew it"
        if now < self.begin:
            return f"is not valid before {_shown(self.begin)}; check the clock, or use it later"
        return ""

    def warning(self, now: datetime.datetime) -> str:
        """Returns what will soon be wrong; empty: nothing.

        Soon is within a week, or for certificates that live less than three weeks, within a third of their life.
        """
        if now > self.end - min(_WARNED_BEFORE, (self.end - self.begin) / 3):
            return self.fault(now) or f"expires on {_shown(self.end)}; renew it"
        return ""


def validities(pem: bytes) -> list[Validity]:
    """Returns the dates of each certificate of a file in PEM.

    Raises:
        ValueError: if one is no certificate.
    """
    try:
        return [_validity(base64.b64decode(found)) for found in _PEM.findall(pem)]
    except (IndexError, StopIteration, ValueError) as exc:
        raise ValueError("a certificate has no dates; make it anew") from exc


def _validity(der: bytes) -> Validity:
    _, certificate = next(_parts(der))
    _, signed = next(_parts(certificate))
    fields = [content for tag, content in _parts(signed) if tag != _VERSION]
    _, _, _, dates = fields[:4]  # The serial number, the algorithm, the issuer, the dates.
    begin, end = (_time(tag, content.decode("ascii")) for tag, content in _parts(dates))
    return Validity(begin, end)


def _parts(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields the type and the content of the values that follow each other."""
    at = 0
    while at < len(der):
        tag, length, at = der[at], der[at + 1], at + 2
        if length > 127:
            size = length - 128
            length, at = int.from_bytes(der[at : at + size], "big"), at + size
        yield tag, der[at : at + length]
        at += length


def _time(tag: int, text: str) -> datetime.datetime:
    if tag == _UTC_TIME:
        text = ("19" if text[0] >= "5" else "20") + text
    return datetime.datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=datetime.UTC)


def _shown(time: datetime.datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M} UTC"
