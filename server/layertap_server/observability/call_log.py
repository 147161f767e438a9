"""One record for each call: written by the parts that the call passes, read by the log, the metrics and the traces.

Rules:
- A record is written in the call's own event loop; other threads may read it. Of a text it has only the length.
- Each call is one line of the log; metrics and traces observe it.
- Request ids come from the caller's metadata if they are short and plain, so that a caller cannot write anything else
  into the log; otherwise they are made here.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import re
import time
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from layertap.errors import LayertapError, StatusCode
from layertap_server.scheduler.events import RunDone
from layertap_server.types import Text

log = logging.getLogger(__name__)

REQUEST_ID: Final = "x-request-id"
"""The metadata key of a request id, in requests and in answers."""

_REQUEST_ID_FORM: Final = re.compile(r"[0-9A-Za-z][0-9A-Za-z._:/+=@-]{0,127}", re.ASCII)
_TRACE_PARENT: Final = "traceparent"
_TRACE_HEADERS: Final = (_TRACE_PARENT, "tracestate")


class Phase:
    """One part of the work on a call, which may happen several times, for example in several batches.

    Attributes:
        started_at_ns: When it first started, by time.monotonic_ns; 0: it did not.
        ended_at_ns: When it last ended.
        time_ns: How long it took in all. Intervals that overlap count twice.
    """

    # Of the class until they are set, so that a call makes its four phases without running a constructor.
    started_at_ns = 0
    ended_at_ns = 0
    time_ns = 0

    def note(self, started_at_ns: int, ended_at_ns: int) -> None:
        """Adds one interval."""
        if not self.started_at_ns or started_at_ns < self.started_at_ns:
            self.started_at_ns = started_at_ns
        if ended_at_ns > self.ended_at_ns:
            self.ended_at_ns = ended_at_ns
        self.time_ns += ended_at_ns - started_at_ns


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class Record:
    """One call, from its arrival to its status.

    Attributes:
        method: The RPC, such as "Embed".
        request_id: What the caller, the answer and the log name this call by.
        trace: The headers traceparent and tracestate, as far as the caller sent them.
        text_count: Texts taken in: tokenized, and admitted where there is a queue.
        failed_text_count: Texts of an EmbedStream that were answered with an error of their own.
        tokenize: Texts becoming tokens.
        queue: From admission to the first batch.
        compute: The batches with texts of the call.
        send: Writing the answer: packing it if it is one message, waiting for the reader if it is several.
        stalled: Whether the caller was dropped because it did not read.
        code: The status; None: OK, or still under way.
        error: The status's message; empty where there is none.
        started_at_ns: When the call arrived, by time.monotonic_ns.
        ended_at_ns: When it had its status; 0: not yet.
    """

    method: str
    request_id: str
    client: str
    trace: Mapping[str, str] = dataclasses.field(default_factory=dict)
    text_count: int = 0
    failed_text_count: int = 0
    token_count: int = 0
    sent_bytes: int = 0
    tokenize: Phase = dataclasses.field(default_factory=Phase)
    queue: Phase = dataclasses.field(default_factory=Phase)
    compute: Phase = dataclasses.field(default_factory=Phase)
    send: Phase = dataclasses.field(default_factory=Phase)
    stalled: bool = False
    code: StatusCode | None = None
    error: str = ""
    started_at_ns: int = dataclasses.field(default_factory=time.monotonic_ns)
    ended_at_ns: int = 0

    @property
    def code_name(self) -> str:
        """The status as gRPC spells it."""
        return "OK" if self.code is None else self.code.name

    @property
    def duration_ns(self) -> int:
        """How long the call took, or has taken so far."""
        return (self.ended_at_ns or time.monotonic_ns()) - self.started_at_ns

    def take(self, texts: Sequence[Text]) -> None:
        """Counts admitted texts."""
        self.text_count += len(texts)
        for text in texts:
            self.token_count += len(text.input_ids)

    def run(self, done: RunDone) -> int:
        """Adds a completed run; returns its number of texts."""
        if not self.queue.started_at_ns:
            self.queue.note(done.started_at_ns - done.queue_time_ns, done.started_at_ns)
        self.compute.note(done.started_at_ns, done.started_at_ns + done.compute_time_ns)
        return len(done.texts)

    def fail(self, error: LayertapError) -> None:
        """Sets the error that the call ends with."""
        self.code, self.error = error.code, error.details


class CallObserver(Protocol):
    """Called for each call, in the event loop; must be quick."""

    def started(self, record: Record) -> None:
        """A call has arrived."""

    def ended(self, record: Record) -> None:
        """A call has its status."""


class CallLog:
    """The records of one server's calls."""

    def __init__(self, observers: Sequence[CallObserver] = ()) -> None:
        self._observers = observers

    def open(self, method: str, *, client: str, metadata: Mapping[str, str | bytes]) -> Record:
        """Begins the record of a call."""
        request_id = metadata.get(REQUEST_ID)
        if not isinstance(request_id, str) or not _REQUEST_ID_FORM.fullmatch(request_id):
            request_id = f"{random.getrandbits(64):016x}"  # os.urandom would let go of the interpreter.
        trace: dict[str, str] = {}
        if _TRACE_PARENT in metadata:
            trace = {name: value for name in _TRACE_HEADERS if isinstance(value := metadata.get(name), str)}
        record = Record(method=method, request_id=request_id, client=client, trace=trace)
        for observer in self._observers:
            observer.started(record)
        return record

    def close(self, record: Record) -> None:
        """Ends the record of a call and shows it to the observers."""
        record.ended_at_ns = time.monotonic_ns()
        for observer in self._observers:
            observer.ended(record)
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
