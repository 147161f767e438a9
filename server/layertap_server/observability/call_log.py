"""The journal of calls: opens a record as a call comes, and when it ends shows it to all who read.

One line of the log for each call is the journal's own; other readers are handed in. Request ids come from the caller's
metadata if they are short and plain, so that nobody can write into the log what is not an id; else they are made here.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from layertap_server.observability.call_record import Record

log = logging.getLogger(__name__)

REQUEST_ID: Final = "x-request-id"
"""The metadata key under which callers name a call, and answers say its name."""

_REQUEST_ID_FORM: Final = re.compile(r"[0-9A-Za-z][0-9A-Za-z._:/+=@-]{0,127}", re.ASCII)
_TRACE_HEADERS: Final = ("traceparent", "tracestate")


class Reader(Protocol):
    """Who is shown each call. Called in the event loop, so it must be quick."""

    def started(self, record: Record) -> None:
        """Is shown a call that has come."""

    def ended(self, record: Record) -> None:
        """Is shown a call that has its status."""


class Journal:
    """The records of one server's calls."""

    def __init__(self, readers: Sequence[Reader] = ()) -> None:
        """Takes who else is shown each call."""
        self._readers = readers

    def open(self, method: str, *, client: str, metadata: Mapping[str, str | bytes]) -> Record:
        """Begins the record of a call."""
        request_id = metadata.get(REQUEST_ID)
        if not isinstance(request_id, str) or not _REQUEST_ID_FORM.fullmatch(request_id):
            request_id = os.urandom(8).hex()
        trace = {name: value for name in _TRACE_HEADERS if isinstance(value := metadata.get(name), str)}
        record = Record(method=method, request_id=request_id, client=client, trace=trace)
        for reader in self._readers:
            reader.started(record)
        return record

    def close(self, record: Record) -> None:
        """Ends the record of a call and shows it to the readers."""
        record.ended_at_ns = time.monotonic_ns()
        for reader in self._readers:
            reader.ended(record)
        if log.isEnabledFor(logging.INFO):
            log.info("call ended", extra={"fields": _fields(record)})


def _fields(record: Record) -> dict[str, str | int | float]:
    """Returns a record as the log shows it."""
    fields: dict[str, str | int | float] = {
        "request_id": record.request_id,
        "method": record.method,
        "code": record.code_name,
        "client": record.client,
        "duration_ms": _ms(record.duration_ns),
        "tokenize_ms": _ms(record.tokenize.time_ns),
        "queue_ms": _ms(record.queue.time_ns),
        "compute_ms": _ms(record.compute.time_ns),
        "text_count": record.text_count,
        "token_count": record.token_count,
        "sent_bytes": record.sent_bytes,
    }
    if record.failed_text_count:
        fields["failed_text_count"] = record.failed_text_count
    if record.error:
        fields["error"] = record.error
    return fields


def _ms(time_ns: int) -> float:
    return round(time_ns / 1e6, 3)
