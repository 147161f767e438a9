"""The texts of one EmbedStream, each from its arrival until its result is sent, by the id that the caller gave it."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

from layertap.errors import InvalidArgumentError, LayertapError
from layertap.v1 import embedding_pb2 as pb
from layertap_server.model.tokenized import Tokenized
from layertap_server.protocol.preprocess import HELD_TEXT_BYTES, held_bytes
from layertap_server.protocol.stream_responses import Result, failures_of, split_run
from layertap_server.scheduler.events import RowsReady, RunDone
from layertap_server.types import Plan


@dataclasses.dataclass(slots=True, eq=False)
class UnsentRun:
    """Texts of one batch whose results are not all sent.

    Attributes:
        left: How many these are.
    """

    left: int


@dataclasses.dataclass(slots=True, eq=False)
class Entry:
    """One text.

    Attributes:
        tokenized: The text, once it is queued.
        tokenize_time_ns: How long tokenizing took, with the texts that came with it.
        run: The batch that it was in, once that is done.
        result: What is to be sent, once that is known.
        held_bytes: About how much memory is held for it.
    """

    tokenized: Tokenized | None = None
    tokenize_time_ns: int = 0
    run: UnsentRun | None = None
    result: Result | None = None
    held_bytes: int = HELD_TEXT_BYTES


class Entries:
    """The texts that are not yet answered."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._entries: dict[int, Entry] = {}
        self._queued: dict[int, int] = {}
        self._queued_count = 0
        self._parts: defaultdict[int, list[RowsReady]] = defaultdict(list)
        self._finished: list[int] = []

    def __len__(self) -> int:
        return len(self._entries)

    def enter(self, number: int) -> None:
        """Notes a text, which from here on is to be answered.

        Raises:
            InvalidArgumentError: if another text has its id.
        """
        if number in self._entries:
            raise InvalidArgumentError(f"id {number} is in use by a text that is not yet answered; number texts anew")
        self._entries[number] = Entry()

    def queue(self, number: int, tokenized: Tokenized, *, tokenize_time_ns: int) -> int:
        """Notes that a text is about to be queued, after all before; returns the memory that is held for it."""
        entry = self._entries[number]
        entry.tokenized, entry.tokenize_time_ns = tokenized, tokenize_time_ns
        entry.held_bytes = held_bytes(tokenized)
        self._queued[self._queued_count] = number
        self._queued_count += 1
        return entry.held_bytes

    def refuse(self, number: int, error: LayertapError) -> None:
        """Notes that the answer to a text is an error."""
        self._finish(number, Result(id=number, error=error))

    def note_rows(self, event: RowsReady) -> None:
        """Notes rows of a run that is under way."""
        self._parts[event.first_text].append(event)

    def note_run(self, done: RunDone) -> int:
        """Makes the results of the texts of a run; returns how many of them failed."""
        parts = self._parts.pop(done.first_text)
        failures = failures_of(parts)
        run = UnsentRun(len(done.texts))
        timings: pb.Timings | None = None
        for position, rows in enumerate(split_run(parts, self._plan)):
            number = self._queued.pop(done.first_text + position)
            entry = self._entries[number]
            entry.run = run
            if error := failures.get(position):
                self.refuse(number, type(error)(f"item {number}: {error.details}"))
                continue
            if timings is None or timings.tokenize_time_ns != entry.tokenize_time_ns:
                timings = pb.Timings(
                    queue_time_ns=done.queue_time_ns,
                    tokenize_time_ns=entry.tokenize_time_ns,
                    compute_time_ns=done.compute_time_ns,
                )
            result = Result(
                id=number, tokenized=entry.tokenized, parts=rows, timings=timings, run=run, position=position
            )
            self._finish(number, result)
        return len(failures)

    def take_results(self, *, in_order: bool) -> list[Result]:
        """Returns the results that may be sent: those that are new, or in the order of the texts all up to a gap."""
        results = []
        if in_order:
            for entry in self._entries.values():
                if entry.result is None:
                    break
                results.append(entry.result)
        else:
            results = [result for number in self._finished if (result := self._entries[number].result)]
        self._finished.clear()
        return results

    def pop(self, number: int) -> Entry:
        """Removes a text, whose id is then free again."""
        return self._entries.pop(number)

    def _finish(self, number: int, result: Result) -> None:
        self._entries[number].result = result
        self._finished.append(number)
