"""One EmbedStream call: texts come in and results go out at the same time, each bounded by the other.

Reading stops while enough texts of this call wait in the queue to keep the instances full, while the queue is full, and
while the requests of all calls take all the memory that they may; HTTP/2 then holds the caller back. A message counts
from its arrival until all its texts are taken in, a text from then until it is answered; one chunk of texts a call may
always have. Results are held until they may be sent, in the order of the texts if the caller wants that, and their
bytes are given back as they are sent: for a caller that does not read, computing soon stops.

When the server stops, reading stops too: what has been read is answered, and the call ends with UNAVAILABLE, so that
the caller sends the rest elsewhere.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Final, TypeAlias

from layertap.errors import InternalError, InvalidArgumentError, LayertapError, UnavailableError
from layertap.v1 import embedding_pb2 as pb
from layertap_server.protocol.preprocess import HELD_TEXT_BYTES, Preprocessor
from layertap_server.protocol.requests import Parts, check_size, stream_chunks, stream_id, stream_inputs
from layertap_server.protocol.stream_responses import messages as messages_of
from layertap_server.rpc.caller import Caller
from layertap_server.rpc.stream_entries import Entries
from layertap_server.scheduler.call import Call, EventQueue
from layertap_server.scheduler.events import CallFailed, Event, RowsReady, RunDone
from layertap_server.shared_memory.segment import Lending
from layertap_server.types import RETRY_ELSEWHERE_S, Text

log = logging.getLogger(__name__)

_MAX_ENTRY_COUNT: Final = 16384
"""Texts that are not yet answered, bad ones too, above which reading stops."""

_CHUNK_TEXTS: Final = 256
"""So many texts of a message are tokenized and queued before it is looked again whether there is room for more."""
_CHUNK_BYTES: Final = 64 << 10
"""Likewise in bytes; a larger text comes alone."""

_CANCELLATION_S: Final = 0.05
"""How long an idle stream waits after its last message: gRPC reports the end of the messages also for a caller that is
gone, and cancels the call a moment later."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Refused:
    """A text that never reached the queue."""

    id: int
    error: LayertapError


@dataclasses.dataclass(frozen=True, slots=True)
class _AllRead:
    """No more is read: the caller has sent its last text, or the server is stopping."""

    stopping: bool


StreamEvent: TypeAlias = Event | _Refused | _AllRead


class Stream:
    """The state of one call."""

    def __init__(
        self,
        options: pb.StreamOptions,
        *,
        preprocessor: Preprocessor,
        caller: Caller,
        inbox: EventQueue[StreamEvent],
        stopping: asyncio.Event,
        lookahead_tokens: int,
        lending: Lending | None,
    ) -> None:
        """Checks the options.

        Raises:
            LayertapError: if one is at fault.
        """
        if options.order not in (pb.RESULT_ORDER_UNSPECIFIED, pb.RESULT_ORDER_AS_SENT, pb.RESULT_ORDER_AS_FINISHED):
            raise InvalidArgumentError(
                f"options.order has the unknown value {options.order}; use one of the contract's"
            )
        self._options = preprocessor.options(options.options)
        self.plan = self._options.plan
        self._lending = lending
        self.inbox = inbox
        self._in_order = options.order != pb.RESULT_ORDER_AS_FINISHED
        self._preprocessor, self._tokenizer = preprocessor, preprocessor.tokenizer
        self._caller, self._record, self._stopping = caller, caller.record, stopping
        self._max_frame_bytes, self._lookahead_tokens = preprocessor.limits.max_frame_bytes, lookahead_tokens
        self._entries = Entries(self.plan)
        self._all_read: _AllRead | None = None
        self._reading = self._ended = self._ended_idle = False
        self._taken = asyncio.Event()

    async def run(self, call: Call) -> None:
        """Answers every text of the call.

        Raises:
            LayertapError: if the call as a whole is at fault, or its answers are not read.
            UnavailableError: if the server is stopping, once it has answered what it had read.
        """
        reader = asyncio.create_task(self._read(call))
        try:
            while not self._all_read or self._entries:
                for event in await self.inbox.take():
                    self._note(event)
                self._taken.set()
                await self._send(call)
                self._note_idle()
                self._taken.set()
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
        if self._ended_idle:
            await asyncio.sleep(_CANCELLATION_S)
        if self._all_read.stopping:
            raise UnavailableError(
                "the server is stopping; send what is unanswered to another", retry_after_s=RETRY_ELSEWHERE_S
            )

    async def _read(self, call: Call) -> None:
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            while await self._read_message(call, stopping):
                pass  # No message is held while the next one is waited for.
            self.inbox.put(_AllRead(stopping=not self._ended))
        except LayertapError as exc:
            self.inbox.put(CallFailed(exc))
        except Exception:
            log.exception("reading a stream failed")
            self.inbox.put(CallFailed(InternalError("the server failed to read the stream; its log has the reason")))
        finally:
            stopping.cancel()

    async def _read_message(self, call: Call, stopping: asyncio.Task[bool]) -> bool:
        """Reads the next message; returns whether there may be another."""
        raw = await self._next(stopping)
        if raw is None:
            return False
        self._caller.add_stream_bytes(len(raw))
        if not await self._admit_message(raw, call):
            return False
        self._caller.add_stream_bytes(-len(raw))
        return True

    async def _admit_message(self, raw: bytes, call: Call) -> bool:
        """Returns whether all texts of a message could be taken in, as there was room, before the server stopped."""
        if len(raw) <= min(_CHUNK_BYTES, self._preprocessor.max_input_bytes):
            # To find the texts by their lengths, and to parse each alone, would take longer than all else of a text.
            if not await self._room(call):
                return False
            inputs = stream_inputs(raw, count=_CHUNK_TEXTS)
            if inputs:
                for text in inputs:
                    self._entries.enter(text.id)
                await self._admit(inputs, call, len(raw))
                return True
        for chunk in stream_chunks(raw, count=_CHUNK_TEXTS, byte_count=_CHUNK_BYTES):
            if not await self._room(call):
                return False
            await self._admit([one for n in range(len(chunk)) if (one := self._parse(chunk, n)) is not None], call)
            await asyncio.sleep(0)  # Short texts are taken in on the event loop, which others need in between.
        return True

    async def _room(self, call: Call) -> bool:
        """Waits until more texts may be taken in; returns whether they may, which a server that stops refuses."""
        while self._has_enough(call):
            await self._wait()
        return not self._stopping.is_set()

    def _has_enough(self, call: Call) -> bool:
        """Returns whether texts that are not yet answered should become fewer before more are taken in."""
        if call.waiting_token_count > self._lookahead_tokens or len(self._entries) > _MAX_ENTRY_COUNT:
            return True
        return bool(self._entries) and not self._caller.has_stream_room

    async def _wait(self) -> None:
        """Waits until something has come of the texts that are not yet answered."""
        self._taken.clear()
        await self._taken.wait()

    async def _next(self, stopping: asyncio.Task[bool]) -> bytes | None:
        """Waits for the next message; None: there is none, or the server is stopping, which ends that task."""

        async def read() -> bytes | None:
            await self._caller.stream_room()
            self._reading = True
            self._note_idle()
            return await self._caller.read()

        reading = asyncio.create_task(read())
        try:
            await asyncio.wait({reading, stopping}, return_when=asyncio.FIRST_COMPLETED)
            raw = reading.result() if reading.done() else None
            self._ended = reading.done() and raw is None
            self._ended_idle = self._ended and not self._entries
            return raw
        finally:
            self._reading = False
            self._note_idle()
            reading.cancel()

    def _note_idle(self) -> None:
        self._caller.set_waiting(self._reading and not self._entries)

    async def _admit(self, inputs: Sequence[pb.StreamInput], call: Call, byte_count: int | None = None) -> None:
        """Tokenizes and queues texts that have entered, of so many bytes; a text at fault gets its own error."""
        self._caller.add_stream_bytes(HELD_TEXT_BYTES * len(inputs))
        started_at_ns = time.monotonic_ns()
        numbers = [one.id for one in inputs]
        results = await self._preprocessor.embed_each(
            [one.input for one in inputs],
            self._options,
            [f"item {number}" for number in numbers],
            self._record,
            byte_count=byte_count,
        )
        tokenize_time_ns = time.monotonic_ns() - started_at_ns
        texts = []
        held = 0
        for number, result in zip(numbers, results, strict=True):
            if isinstance(result, LayertapError):
                self.inbox.put(_Refused(number, result))
                continue
            held += self._entries.queue(number, result, tokenize_time_ns=tokenize_time_ns) - HELD_TEXT_BYTES
            texts.append(result.text)
        self._caller.add_stream_bytes(held)
        for portion in self._portions(texts):
            while not call.add(portion, waits=True):
                await self._wait()
        self._record.take(texts)

    def _portions(self, texts: Sequence[Text]) -> Iterator[Sequence[Text]]:
        """Yields texts that are queued at once: long ones, which run as windows, alone, so that room comes for each."""
        start = 0
        for end, text in enumerate(texts):
            if text.windows is not None:
                yield texts[start:end]
                yield texts[end : end + 1]
                start = end + 1
        yield texts[start:]

    def _parse(self, parts: Parts[pb.StreamInput], index: int) -> pb.StreamInput | None:
        """Returns a text of a large message, which has entered; None: it is refused."""
        most, size = self._preprocessor.max_input_bytes, parts.sizes[index]
        one = parts[index] if size <= most else None
        number = stream_id(parts.raw(index)) if one is None else one.id
        self._entries.enter(number)
        if one is None:
            self._caller.add_stream_bytes(HELD_TEXT_BYTES)
            try:
                check_size(size, f"item {number}", self._preprocessor.limits, most)
            except LayertapError as exc:
                self.inbox.put(_Refused(number, exc))
        return one

    def _note(self, event: StreamEvent) -> None:
        if isinstance(event, CallFailed):
            raise event.error
        if isinstance(event, _AllRead):
            self._all_read = event
        elif isinstance(event, _Refused):
            self._entries.refuse(event.id, event.error)
            self._record.failed_text_count += 1
        elif isinstance(event, RowsReady):
            self._entries.note_rows(event)
        elif isinstance(event, RunDone):
            self._record.run(event)
            self._record.failed_text_count += self._entries.note_run(event)

    async def _send(self, call: Call) -> None:
        """Sends what may be sent, and gives its bytes back."""
        results = self._entries.take_results(in_order=self._in_order)
        for message, sent in messages_of(results, self.plan, self._tokenizer, self._max_frame_bytes, self._lending):
            # A caller that has an answer may use its id again, so the id is free before the answer leaves.
            entries = [self._entries.pop(result.id) for result in sent]
            await self._caller.write(message)
            self._caller.add_stream_bytes(-sum(entry.held_bytes for entry in entries))
            byte_count = 0
            for entry in entries:
                if entry.run is None or entry.tokenized is None:
                    continue
                entry.run.left -= 1
                byte_count += call.bytes_of(entry.tokenized.text)
                if not entry.run.left:
                    call.release(byte_count, run_done=True)
                    byte_count = 0
            if byte_count:
                call.release(byte_count)
