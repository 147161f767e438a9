"""What is known of one call: noted once, where it happens, and read by the log, the metrics and the traces.

Pure. Written in the call's own event loop; other threads may read. Never holds anything of a text but its length.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

from layertap.errors import LayertapError, StatusCode
from layertap_server.scheduler.call import RunDone
from layertap_server.types import Text


@dataclasses.dataclass(slots=True)
class Phase:
    """One part of a call's way, which it may come through several times: in several batches, say.

    Attributes:
        started_at_ns: When the call first came into it, by time.monotonic_ns; 0: it did not.
        ended_at_ns: When the call last left it.
        time_ns: How long it was there in all. What overlaps counts twice.
    """

    started_at_ns: int = 0
    ended_at_ns: int = 0
    time_ns: int = 0

    def note(self, started_at_ns: int, ended_at_ns: int) -> None:
        """Takes note of one stay."""
        if not self.started_at_ns or started_at_ns < self.started_at_ns:
            self.started_at_ns = started_at_ns
        self.ended_at_ns = max(self.ended_at_ns, ended_at_ns)
        self.time_ns += ended_at_ns - started_at_ns


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class Record:
    """One call, from its arrival to its status.

    Attributes:
        method: The RPC, such as "Embed".
        request_id: What the caller, the answer and the log name this call by.
        client: Whose it is.
        trace: What the caller's tracing sent along: the headers traceparent and tracestate.
        text_count: Texts taken in: tokenized, and admitted where there is a queue.
        failed_text_count: Texts of an EmbedStream that were answered with an error of their own.
        token_count: Tokens of the texts taken in.
        sent_bytes: Bytes of the messages sent.
        tokenize: Texts becoming tokens.
        queue: From admission to the first batch.
        compute: The batches the call had a share in.
        send: Writing the answer: packing it if it is one message, waiting for the reader if it is several.
        stalled: Whether the caller was dropped because it did not read.
        code: The status; None: OK, or still under way.
        error: The status's message; empty where there is none.
        started_at_ns: When the call came, by time.monotonic_ns.
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
        """Takes note of texts that were taken in."""
        self.text_count += len(texts)
        self.token_count += sum(text.token_count for text in texts)

    def run(self, done: RunDone) -> int:
        """Takes note of a run; returns how many texts it had."""
        if not self.queue.started_at_ns:
            self.queue.note(done.started_at_ns - done.queue_time_ns, done.started_at_ns)
        self.compute.note(done.started_at_ns, done.started_at_ns + done.compute_time_ns)
        return len(done.texts)

    def fail(self, error: LayertapError) -> None:
        """Takes note of what the call ends with."""
        self.code, self.error = error.code, error.details
