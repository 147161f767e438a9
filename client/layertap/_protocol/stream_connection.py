"""The items of an `embed_stream` that were sent over one connection and have no answer yet, without any I/O.

Pure. Items leave by `take` in messages, and their answers come back by `feed`. After a lost connection `lost` gives all
items without an answer back to be sent again, over any connection, so that each item is answered exactly once. An item
that was in flight at too many lost connections, none of which brought any answer, is answered UNAVAILABLE: it may be
what stops the server. A connection that brought answers before it was lost says nothing about its items.
"""

from __future__ import annotations

from typing import Final

from layertap import wire
from layertap._protocol.answer_plan import AnswerPlan, token_bound
from layertap._protocol.stream_results import Frames, text_answers
from layertap._protocol.stream_state import Item, StreamState
from layertap.errors import DataLossError, LayertapError, UnavailableError, from_status
from layertap.results.streamed import StreamResult
from layertap.v1 import embedding_pb2 as pb

MAX_LOST_COUNT: Final = 3
"""Lost connections without any answer after which an item that was in flight at each of them is given up."""


class StreamConnection:
    """The items of one connection: sent over it, and not answered yet."""

    def __init__(self, state: StreamState) -> None:
        self._state = state
        self._sent: dict[int, Item] = {}
        self._plan: AnswerPlan | None = None
        self._got_on = self._counted = False

    @property
    def accepted(self) -> bool:
        """Whether the server has accepted the options."""
        return self._plan is not None

    @property
    def unanswered_count(self) -> int:
        """Items that were sent and have no answer yet."""
        return len(self._sent)

    @property
    def has_unsent(self) -> bool:
        """Whether `take` has something to send."""
        return self._state.has_unsent and self._state.room_after(len(self._sent)) > 0

    def take(self) -> pb.EmbedStreamRequest:
        """Returns the next message to send."""
        taken = self._state.take(self._state.room_after(len(self._sent)))
        self._sent |= taken
        request = pb.EmbedStreamRequest()
        inputs = request.inputs.inputs
        for index, item in taken.items():
            inputs.add(id=index, input=item.message)
        return request

    def lost(self, reason: LayertapError) -> None:
        """Gives every unanswered item back to be sent again, after the connection was lost."""
        # What no server has seen is not what brought it down.
        blamed = self.accepted and not self._got_on
        self._plan, self._got_on = None, False
        items, self._sent = self._sent, {}
        for index, item in list(items.items()):
            item.frames = None
            item.lost_count += blamed
            if item.lost_count == MAX_LOST_COUNT:
                del items[index]
                error = UnavailableError(
                    f"item {index} was in flight at {MAX_LOST_COUNT} lost connections; send it alone to see whether "
                    f"it is the cause (last: {reason.details})"
                )
                self._state.answer(index, StreamResult(index=index, error=error, _embedding=None))
        self._state.send_again(items)

    def feed(self, part: pb.EmbedStreamResponse, data: memoryview, view: wire.View | None = None) -> None:
        """Adds one message of the answer, with its payload and the shared rows it refers to.

        Raises:
            DataLossError: if the message does not fit what was sent.
            FailedPreconditionError: if another model answers than before.
        """
        kind, plan = part.WhichOneof("part"), self._plan
        if (kind == "header") != (plan is None):
            raise DataLossError("the answer does not open with exactly one header; ask again")
        if plan is None:
            self._plan = self._state.open(part.header)
            if not self._counted:
                self._counted = True
                self._state.connection_count += 1
        elif kind == "results":
            # Before memory is taken for it.
            for index, count in zip(part.results.ids, part.results.token_counts, strict=False):
                if count > token_bound(self._waiting(index).size, self._state.options):
                    raise DataLossError(f"item {index} has {count} tokens; ask again")
            for index, answer in text_answers(part, plan, data, view):
                self._state.embed(index, self._answered(index), answer)
            for failure in part.results.failures:
                self._answered(failure.id)
                error = from_status(failure.code, failure.message)
                self._state.answer(failure.id, StreamResult(index=failure.id, error=error, _embedding=None))
            self._state.note_size(len(data), len(part.results.ids))
        elif kind == "frame":
            self._frame(part.frame, plan.header, data)
        else:
            raise DataLossError("the answer has an unknown part; the server is newer than this client")

    def _frame(self, frame: pb.StreamFrame, header: pb.EmbedHeader, data: memoryview) -> None:
        item = self._waiting(frame.id)
        if item.frames is None:
            item.frames = Frames(frame, header, token_bound(item.size, self._state.options))
        item.frames.add(frame, data)
        if frame.done:
            answer = item.frames.answer(frame)
            self._state.note_size(sum(array.nbytes for array in answer.arrays.values()), 1)
            self._state.embed(frame.id, self._answered(frame.id), answer)

    def _waiting(self, index: int) -> Item:
        item = self._sent.get(index)
        if item is None:
            raise DataLossError(f"the answer has item {index}, which is not waiting; ask again")
        return item

    def _answered(self, index: int) -> Item:
        """Returns an item that is answered now."""
        item = self._waiting(index)
        del self._sent[index]
        self._got_on = True
        return item
