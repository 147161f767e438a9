"""Inputs on their way through the queue, and the pieces that are yielded of them.

Rules:
- What is computed and not yet yielded is bounded by bytes and by texts, so a reader that stops soon stops the engine.
- While a piece is with the reader, the engine computes the next ones.
- A text that fails costs nothing but itself; only an engine that fails ends the stream.
"""

from __future__ import annotations

import dataclasses
import itertools
import queue
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Final, TypeAlias

import numpy as np

from layertap import wire
from layertap._protocol.answer_plan import check_header
from layertap._protocol.inputs import InputItem, to_message
from layertap._protocol.result_builder import Answer, attention_mask, build_embedding
from layertap.errors import InvalidArgumentError, LayertapError
from layertap.results.embedding import Embedding
from layertap.types import FloatArray, Timings
from layertap.v1 import embedding_pb2 as pb
from layertap_server.model.tokenized import Tokenized
from layertap_server.model.tokenizer import Tokenizer
from layertap_server.protocol import responses
from layertap_server.protocol.preprocess import Result
from layertap_server.protocol.stream_responses import failures_of, split_run
from layertap_server.scheduler.batcher import Batcher
from layertap_server.scheduler.call import Call
from layertap_server.scheduler.events import CallFailed, Event, RowsReady, RunDone
from layertap_server.types import Output, Plan

Tokenize: TypeAlias = Callable[[list[pb.Input]], Future[list[Result]]]

LABEL: Final = "the text"
"""What the error of a text calls it; its place is its row in the piece."""
_CHUNK_TEXTS: Final = 256
"""Texts that are tokenized at once."""
_MAX_TEXTS: Final = 8192
"""Texts that are read ahead of the last piece."""
_MAX_BYTES: Final = 128 << 20
"""Outputs that are computed ahead of the last piece, but always one text."""
_PIECE_BYTES: Final = 16 << 20
_PIECE_TEXTS: Final = 1024
"""A piece that has as much of either is yielded; it has at most the rest of a batch more."""
_NO_TIMINGS: Final = Timings(queue_time_ns=0, tokenize_time_ns=0, compute_time_ns=0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """What came of some inputs that follow each other.

    Attributes:
        embedding: The embedding of all good ones. None: there is none.
        errors: For each input why it has no embedding; None: it has.
    """

    embedding: Embedding | None
    errors: Sequence[LayertapError | None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Good:
    """An input that is a text.

    Attributes:
        message: The text.
        tokenized: Its tokens.
        byte_count: What its outputs take until they are yielded.
    """

    message: pb.Input
    tokenized: Tokenized
    byte_count: int


Entry: TypeAlias = Good | LayertapError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Builder:
    """Makes embeddings of the rows of some runs that follow each other.

    Attributes:
        options: What is asked of each text.
        header: What the answer is made of.
        plan: The options, resolved.
        tokenizer: For the tokens of a text, where they are asked for.
    """

    options: pb.EmbedOptions
    header: pb.EmbedHeader
    plan: Plan
    tokenizer: Tokenizer

    def piece(self, entries: Sequence[Entry], runs: Sequence[Sequence[RowsReady]]) -> Piece:
        """Returns what came of some inputs.

        Args:
            entries: The inputs.
            runs: The rows of the texts among them, run by run.
        """
        errors = [one if isinstance(one, LayertapError) else None for one in entries]
        places = [place for place, one in enumerate(entries) if isinstance(one, Good)]
        texts: list[Good] = []
        data: defaultdict[tuple[int, int], list[memoryview]] = defaultdict(list)
        for parts in runs:
            failures = failures_of(parts)
            own, places = places[: len(parts[0].texts)], places[len(parts[0].texts) :]
            for position, place in enumerate(own):
                if position in failures:
                    errors[place] = failures[position]
                elif isinstance(one := entries[place], Good):
                    texts.append(one)
            if not failures:
                for part in parts:
                    data[part.rows.output_index, part.rows.layer].append(part.rows.data)
                continue
            good = (rows for position, rows in enumerate(split_run(parts, self.plan)) if position not in failures)
            for output_index, layer, values in itertools.chain.from_iterable(good):
                data[output_index, layer].append(values)
        return Piece(embedding=self._embedding(texts, data) if texts else None, errors=errors)

    def blank(self, text: Good) -> Embedding:
        """Returns the embedding of a text with zeros for numbers."""
        data: dict[tuple[int, int], list[memoryview]] = {}
        for output_index, output in enumerate(self.plan.outputs):
            (row_count,) = output.row_counts([text.tokenized.text])
            zeros = memoryview(bytes(self.plan.row_bytes(output) * row_count))
            data |= {(output_index, layer): [zeros] for layer in output.layers}
        return self._embedding([text], data)

    def _embedding(self, texts: Sequence[Good], data: Mapping[tuple[int, int], Sequence[memoryview]]) -> Embedding:
        messages, tokenized = [one.message for one in texts], [one.tokenized for one in texts]
        token_counts = np.array([one.text.token_count for one in tokenized], np.int64)
        answer = Answer(
            arrays={place: self._array(self.plan.outputs[place[0]], values) for place, values in data.items()},
            token_counts=token_counts,
            truncated=np.array([one.truncated for one in tokenized], np.bool_),
            window_counts=np.array([one.text.window_count for one in tokenized], np.int64),
            span_counts=[one.text.span_count for one in tokenized],
            attention_mask=attention_mask(messages, token_counts),
            timings=_NO_TIMINGS,
            tokens=[responses.tokens(one, self.tokenizer) for one in tokenized] if self.options.return_tokens else (),
            words=[responses.words(one) for one in tokenized] if self.plan.has_words else (),
        )
        return build_embedding(check_header(self.header, self.options, []), answer, messages)

    def _array(self, output: Output, data: Sequence[memoryview]) -> FloatArray:
        """Returns rows that lie in several buffers as one array. Shape: [row_count, row_size]."""
        row_bytes, dtype = self.plan.row_bytes(output), self.header.dtype
        counts = [len(one) // row_bytes for one in data]
        array = wire.empty((sum(counts), output.row_size), dtype)
        for end, count, one in zip(itertools.accumulate(counts), counts, data, strict=True):
            wire.read_into(array[end - count : end], one, dtype)
        return array


class Stream:
    """The inputs of one call of `OfflineModel.embed`, from their reading to their piece."""

    def __init__(self, inputs: Iterable[InputItem], tokenize: Tokenize, builder: Builder) -> None:
        self._inputs = iter(inputs)
        self._tokenize = tokenize
        self._builder = builder
        self._entries: deque[Entry] = deque()
        self._waiting: deque[Good] = deque()
        self._ahead_bytes = 0
        self._parts: defaultdict[int, list[RowsReady]] = defaultdict(list)
        self._done: dict[int, RunDone] = {}
        self._runs: list[RunDone] = []
        self._next_text = self._queued_count = 0
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._chunk = self._read()

    def pieces(self, batcher: Batcher) -> Iterator[Piece]:
        """Yields all pieces."""
        call = batcher.open(self._builder.plan, client="", deliver=self._events.put)
        try:
            while True:
                self._fill(call)
                while self._is_short():
                    self._note(self._events.get(), call)
                    self._fill(call)
                if not self._entries:
                    return
                yield self._piece()
        finally:
            call.close()

    def _is_short(self) -> bool:
        """Returns whether a piece has to wait for more rows."""
        if self._next_text == self._queued_count:  # Nothing is in the queue, nor can anything be added to it.
            return False
        byte_count = sum(run.reserved_bytes for run in self._runs)
        return byte_count < _PIECE_BYTES and sum(len(run.texts) for run in self._runs) < _PIECE_TEXTS

    def _fill(self, call: Call) -> None:
        """Reads, tokenizes and queues inputs as there is room."""
        while True:
            texts = []
            while self._waiting:
                byte_count = self._waiting[0].byte_count
                if self._ahead_bytes and self._ahead_bytes + byte_count > _MAX_BYTES:
                    break
                self._ahead_bytes += byte_count
                texts.append(self._waiting.popleft().tokenized.text)
            if texts:
                self._queued_count += len(texts)
                call.add(texts)
            if self._waiting or self._chunk is None or len(self._entries) >= _MAX_TEXTS:
                return
            chunk, self._chunk = self._chunk, self._read()
            self._enter(*chunk)

    def _read(self) -> tuple[list[pb.Input | LayertapError], Future[list[Result]]] | None:
        """Starts to tokenize the next inputs; None: there are none."""
        messages: list[pb.Input | LayertapError] = []
        for item in itertools.islice(self._inputs, _CHUNK_TEXTS):
            try:
                messages.append(to_message(item, 0))
            except InvalidArgumentError as exc:
                messages.append(InvalidArgumentError(exc.details.replace("inputs[0]", LABEL, 1)))
        if not messages:
            return None
        return messages, self._tokenize([one for one in messages if isinstance(one, pb.Input)])

    def _enter(self, messages: Sequence[pb.Input | LayertapError], tokenizing: Future[list[Result]]) -> None:
        results = iter(tokenizing.result())
        for message in messages:
            result = message if isinstance(message, LayertapError) else next(results)
            if isinstance(result, LayertapError):
                self._entries.append(result)
            elif isinstance(message, pb.Input):
                byte_count = self._builder.plan.held_bytes(result.text)
                good = Good(message=message, tokenized=result, byte_count=byte_count)
                self._entries.append(good)
                self._waiting.append(good)

    def _note(self, event: Event, call: Call) -> None:
        if isinstance(event, CallFailed):
            raise event.error
        if isinstance(event, RowsReady):
            self._parts[event.first_text].append(event)
        elif isinstance(event, RunDone):
            self._done[event.first_text] = event
            # Unsent outputs are bounded here, so that one slow run does not hold up the others.
            call.release(event.reserved_bytes, run_done=True)
            while (run := self._done.pop(self._next_text, None)) is not None:
                self._runs.append(run)
                self._next_text += len(run.texts)

    def _piece(self) -> Piece:
        """Removes what is complete."""
        runs, self._runs = self._runs, []
        left = sum(len(run.texts) for run in runs)
        entries: list[Entry] = []
        while self._entries and (left or isinstance(self._entries[0], LayertapError)):
            entry = self._entries.popleft()
            if isinstance(entry, Good):
                left -= 1
                self._ahead_bytes -= entry.byte_count
            entries.append(entry)
        return self._builder.piece(entries, [self._parts.pop(run.first_text) for run in runs])
