"""The items of an `embed_stream` that were sent and have no answer yet, without any I/O.

Pure. Items come in by `offer`, leave by `take` in messages, and their answers come back by `feed`. After a lost
connection `lost` marks all items without an answer to be sent again, so that each item is answered exactly once. An
item that was in flight at too many lost connections, none of which brought any answer, is answered UNAVAILABLE: it may
be what stops the server. A connection that brought answers before it was lost says nothing about its items.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np

from layertap import wire
from layertap._protocol.inputs import InputItem, to_message
from layertap._protocol.responses import ModelPin, check_header, token_bound
from layertap._protocol.result_builder import EmbeddingBuilder
from layertap._protocol.stream_results import Frames, TextAnswer, text_answers
from layertap.errors import (
    DataLossError,
    InvalidArgumentError,
    LayertapError,
    UnavailableError,
    from_status,
)
from layertap.results.streamed import StreamResult
from layertap.v1 import embedding_pb2 as pb

MAX_UNANSWERED_COUNT: Final = 4096
MAX_UNANSWERED_BYTES: Final = 8 << 20
"""How far sending may run ahead of the answers. It goes on when a quarter is answered, so that messages stay full."""

MAX_MESSAGE_COUNT: Final = 256
MAX_MESSAGE_BYTES: Final = 60 << 10
"""How much one message carries. The server reads up to 64 KiB at once, and takes apart what is larger."""

MAX_LOST_COUNT: Final = 3
"""Lost connections without any answer after which an item that was in flight at each of them is given up."""


@dataclasses.dataclass(slots=True)
class _Item:
    message: pb.Input
    size: int
    lost_count: int = 0
    frames: Frames | None = None


class StreamState:
    """The items of one `embed_stream`, from offered to answered."""

    def __init__(
        self,
        options: pb.EmbedOptions,
        *,
        ordered: bool,
        message_count: int = MAX_MESSAGE_COUNT,
        pin: ModelPin | None = None,
    ) -> None:
        """Begins without any item.

        Args:
            options: What is asked of each.
            ordered: Whether answers leave in the order of the items.
            message_count: How many items one message carries at most.
            pin: The one model that may answer.
        """
        self._options = options
        self._ordered = ordered
        self._pin = pin or ModelPin()
        self._message_count = min(message_count, MAX_MESSAGE_COUNT)
        self._header: pb.EmbedHeader | None = None
        self._builder: EmbeddingBuilder | None = None
        self._header_due = True
        self._got_on = False
        self._offered_count = 0
        self._unanswered: dict[int, _Item] = {}
        self._unanswered_bytes = 0
        self._is_full = False
        self._unsent: dict[int, _Item] = {}
        self._ready: dict[int, StreamResult] = {}
        self._next_index = 0

    @property
    def has_room(self) -> bool:
        """Whether another item may be offered."""
        return not self._is_full

    @property
    def unanswered_count(self) -> int:
        """Items that were offered and have no answer yet."""
        return len(self._unanswered)

    @property
    def has_unsent(self) -> bool:
        """Whether `take` has something to send."""
        return bool(self._unsent)

    @property
    def started(self) -> bool:
        """Whether any server has ever answered."""
        return self._header is not None

    @property
    def accepted(self) -> bool:
        """Whether the server of this connection has accepted the options."""
        return not self._header_due

    @property
    def opening(self) -> pb.EmbedStreamRequest:
        """The first message of each connection."""
        order = pb.RESULT_ORDER_AS_SENT if self._ordered else pb.RESULT_ORDER_AS_FINISHED
        return pb.EmbedStreamRequest(options=pb.StreamOptions(options=self._options, order=order))

    def offer(self, item: InputItem) -> None:
        """Adds an item; an item that is no input gets its error as its result."""
        index = self._offered_count
        self._offered_count += 1
        try:
            message = to_message(item, index)
        except InvalidArgumentError as exc:
            self._ready[index] = StreamResult(index=index, error=exc, _embedding=None)
        else:
            entry = _Item(message, message.ByteSize())
            self._unanswered[index] = self._unsent[index] = entry
            self._unanswered_bytes += entry.size
        self._note_room()

    def take(self) -> pb.EmbedStreamRequest:
        """Returns the next message to send."""
        request = pb.EmbedStreamRequest()
        inputs, size = request.inputs.inputs, 0
        while self._unsent and size < MAX_MESSAGE_BYTES and len(inputs) < self._message_count:
            index = next(iter(self._unsent))
            item = self._unsent.pop(index)
            inputs.add(id=index, input=item.message)
            size += item.size
        return request

    def lost(self, reason: LayertapError) -> None:
        """Marks every unanswered item to be sent again, after the connection was lost."""
        blamed, self._header_due = not (self._header_due or self._got_on), True
        for index, item in list(self._unanswered.items()):
            item.frames = None
            if index in self._unsent or not blamed:
                continue  # What no server has seen is not what brought it down.
            item.lost_count += 1
            if item.lost_count == MAX_LOST_COUNT:
                error = UnavailableError(
                    f"item {index} was in flight at {MAX_LOST_COUNT} lost connections; send it alone to see whether "
                    f"it is the cause (last: {reason.details})"
                )
                self._answer(index, StreamResult(index=index, error=error, _embedding=None))
        self._unsent = dict(self._unanswered)

    def feed(self, part: pb.EmbedStreamResponse, data: memoryview, view: wire.View | None = None) -> None:
        """Adds one message of the answer, with its payload and the shared rows it refers to.

        Raises:
            DataLossError: if the message does not fit what was sent.
            FailedPreconditionError: if another model answers than before.
        """
        kind = part.WhichOneof("part")
        if (kind == "header") != self._header_due:
            raise DataLossError("the answer does not open with exactly one header; ask again")
        if kind == "header":
            self._open(part.header)
        elif kind == "results":
            assert self._header is not None
            offsets = list(part.shared_rows.offsets)
            answers = text_answers(part.results, self._header, self._options, data=data, offsets=offsets, view=view)
            for index, answer in answers:
                self._embed(index, answer)
            for failure in part.results.failures:
                error = from_status(failure.code, failure.message)
                self._answer(failure.id, StreamResult(index=failure.id, error=error, _embedding=None))
        elif kind == "frame":
            self._frame(part.frame, data)
        else:
            raise DataLossError("the answer has an unknown part; the server is newer than this client")

    def ready(self) -> list[StreamResult]:
        """Returns the answers that may be handed out, each once."""
        if not self._ordered:
            results = list(self._ready.values())
            self._ready.clear()
        else:
            results = []
            while self._next_index in self._ready:
                results.append(self._ready.pop(self._next_index))
                self._next_index += 1
        self._note_room()
        return results

    def _note_room(self) -> None:
        """Notes whether sending has run too far ahead; once it has, until a quarter of that is answered and read."""
        waiting = len(self._unanswered) + len(self._ready)
        quarters = 3 if self._is_full else 4
        self._is_full = (
            4 * waiting >= quarters * MAX_UNANSWERED_COUNT
            or 4 * self._unanswered_bytes >= quarters * MAX_UNANSWERED_BYTES
        )

    def _open(self, header: pb.EmbedHeader) -> None:
        self._pin.check(header.model_id, header.fingerprint)
        check_header(header, self._options, [])
        self._header, self._builder = header, EmbeddingBuilder(header, self._options)
        self._header_due = self._got_on = False

    def _frame(self, frame: pb.StreamFrame, data: memoryview) -> None:
        assert self._header is not None
        item = self._waiting(frame.id)
        if item.frames is None:
            item.frames = Frames(frame, self._header, token_bound(item.size, self._options))
        item.frames.add(frame, data)
        if frame.done:
            self._embed(frame.id, item.frames.answer(frame))

    def _waiting(self, index: int) -> _Item:
        item = self._unanswered.get(index)
        if item is None:
            raise DataLossError(f"the answer has item {index}, which is not waiting; ask again")
        return item

    def _embed(self, index: int, answer: TextAnswer) -> None:
        item = self._waiting(index)
        if answer.token_count > token_bound(item.size, self._options):
            raise DataLossError(f"item {index} has {answer.token_count} tokens; ask again")
        self._answer(index, self._result(index, item.message, answer))

    def _result(self, index: int, message: pb.Input, answer: TextAnswer) -> StreamResult:
        assert self._builder is not None
        mask = answer.ones
        if message.HasField("token_ids") and (given := message.token_ids.attention_mask):
            mask = np.array([given], np.int64)
            if mask.shape != answer.ones.shape:
                raise DataLossError(f"item {index} has {answer.token_count} tokens; ask again")
        embedding = self._builder.build(
            arrays=answer.arrays,
            messages=(message,),
            token_counts=answer.token_counts,
            truncated=answer.truncated,
            window_counts=answer.window_counts,
            attention_mask=mask,
            timings=answer.timings,
            tokens=answer.tokens,
            words=answer.words,
        )
        return StreamResult(index=index, error=None, _embedding=embedding)

    def _answer(self, index: int, result: StreamResult) -> None:
        item = self._waiting(index)
        del self._unanswered[index]
        self._got_on = True
        self._unanswered_bytes -= item.size
        self._ready[index] = result
