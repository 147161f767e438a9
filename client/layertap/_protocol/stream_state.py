"""The items of an `embed_stream` that have no answer yet, and answers that are not handed out yet, without any I/O.

Pure. Items come in by `offer` and answers leave by `ready`. Between them are connections, each with a part of the
items; see `stream_connection`.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from typing import Final

import numpy as np

from layertap._protocol.answer_plan import AnswerPlan, check_header, span_count
from layertap._protocol.inputs import InputItem, to_message
from layertap._protocol.responses import ModelPin
from layertap._protocol.result_builder import Answer, build_embedding
from layertap._protocol.stream_results import Frames
from layertap.errors import DataLossError, InvalidArgumentError
from layertap.results.streamed import StreamResult
from layertap.v1 import embedding_pb2 as pb

MAX_UNANSWERED_COUNT: Final = 4096
MAX_UNANSWERED_BYTES: Final = 8 << 20
"""How far sending may run ahead of the answers. It goes on when a quarter is answered, so that messages stay full."""

MAX_MESSAGE_COUNT: Final = 256
MAX_MESSAGE_BYTES: Final = 60 << 10
"""How much one message carries, unless one item alone is larger. The server reads up to 64 KiB at once, and takes apart
what is larger. No server refuses so much; an item of more is sent only once the server's limit is known."""

_ENVELOPE_BYTES: Final = 64
"""The most that a message takes beside its only item."""

LONG_COUNT: Final = 2 * MAX_MESSAGE_COUNT
LONG_BYTES: Final = 2 * MAX_MESSAGE_BYTES
"""A stream of more is long: several connections share it."""

MIN_CONNECTION_COUNT: Final = 512
"""How many unanswered items each of several connections may have at least, if results are small."""
MIN_SHARE_COUNT: Final = MAX_MESSAGE_COUNT // 4
"""So many each of them may have of however few, so that messages are not too small."""
MAX_EARLY_BYTES: Final = 64 << 20
"""About how many bytes of results of each of several connections may come before those of another."""
MIN_LARGE_COUNT: Final = 8
"""How many unanswered items each may have however large results are."""


@dataclasses.dataclass(slots=True)
class Item:
    """An item that has no answer yet.

    Attributes:
        message: What is sent.
        size: Its bytes.
        lost_count: At how many lost connections without any answer it was in flight.
        frames: What has come of it.
    """

    message: pb.Input
    size: int
    lost_count: int = 0
    frames: Frames | None = None


class StreamState:
    """The items of one `embed_stream`, from offered to answered.

    Attributes:
        options: What is asked of each.
        connection_count: The connections that share what is to be sent: those that the server has accepted.
        expected_count: How many of them to leave items for; None: not known yet, perhaps several.
    """

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
        self.options = options
        self._ordered = ordered
        self._pin = pin or ModelPin()
        self._message_count = min(message_count, MAX_MESSAGE_COUNT)
        self._plan: AnswerPlan | None = None
        self.connection_count = 0
        self.expected_count: int | None = 0
        self._result_bytes = 0.0
        self._offered_count = self._offered_bytes = 0
        self._unanswered: dict[int, Item] = {}
        self._unanswered_bytes = 0
        self._is_full = False
        self._unsent: dict[int, Item] = {}
        self._large: list[int] = []
        self._max_request_bytes: int | None = None
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
        """Whether items wait to be sent."""
        return bool(self._unsent)

    @property
    def needs_limit(self) -> bool:
        """Whether `limit` must be told before `take`: an item may be larger than the server takes."""
        return self._max_request_bytes is None and bool(self._large)

    @property
    def has_ready(self) -> bool:
        """Whether `ready` has answers."""
        return self._next_index in self._ready if self._ordered else bool(self._ready)

    @property
    def is_long(self) -> bool:
        """Whether several connections pay."""
        return self._offered_count > LONG_COUNT or self._offered_bytes > LONG_BYTES

    @property
    def started(self) -> bool:
        """Whether any server has ever answered."""
        return self._plan is not None

    @property
    def opening(self) -> pb.EmbedStreamRequest:
        """The first message of each connection."""
        order = pb.RESULT_ORDER_AS_SENT if self._ordered else pb.RESULT_ORDER_AS_FINISHED
        return pb.EmbedStreamRequest(options=pb.StreamOptions(options=self.options, order=order))

    def offer(self, item: InputItem) -> None:
        """Adds an item; an item that is no input gets its error as its result."""
        index = self._offered_count
        self._offered_count += 1
        try:
            message = to_message(item, index)
        except InvalidArgumentError as exc:
            self._ready[index] = StreamResult(index=index, error=exc, _embedding=None)
        else:
            entry = Item(message, message.ByteSize())
            self._unanswered[index] = self._unsent[index] = entry
            self._unanswered_bytes += entry.size
            self._offered_bytes += entry.size
            if entry.size > MAX_MESSAGE_BYTES:
                self._large.append(index)
                if self._max_request_bytes is not None:
                    self.limit(self._max_request_bytes)
        self._note_room()

    def limit(self, max_request_bytes: int) -> None:
        """Answers what is too large for one message with an error: gRPC itself would end the whole call for it.

        0: the limit is not known, and nothing too large.
        """
        self._max_request_bytes = max_request_bytes = max_request_bytes or sys.maxsize
        for index in self._large:
            if (item := self._unsent.get(index)) and item.size > max_request_bytes - _ENVELOPE_BYTES:
                del self._unsent[index]
                error = InvalidArgumentError(
                    f"item {index} has {item.size} bytes, the most of a request is {max_request_bytes}; "
                    "split it into several texts"
                )
                self.answer(index, StreamResult(index=index, error=error, _embedding=None))
        self._large.clear()

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
        most = max(MAX_UNANSWERED_COUNT, MIN_CONNECTION_COUNT * self.connection_count)
        quarters = 3 if self._is_full else 4
        self._is_full = 4 * waiting >= quarters * most or 4 * self._unanswered_bytes >= quarters * MAX_UNANSWERED_BYTES

    def room_after(self, count: int) -> int:
        """Returns how many more items a connection may have beside so many that are not answered.

        Of several connections each goes on when a quarter is answered.
        """
        most = self._connection_room()
        room = most - count
        return room if self.connection_count <= 1 or 4 * room >= most else 0

    def _connection_room(self) -> int:
        """Returns how many unanswered items one connection may have.

        Several connections share evenly what there is. Results that come before those of earlier items are kept: each
        connection has only as many items under way as that bounds the memory for them.
        """
        if self.expected_count is None or self.connection_count < self.expected_count:
            # No more than a short stream has, so that something is left for those that come.
            of_bytes = LONG_BYTES * self._offered_count // max(self._offered_bytes, 1)
            return min(LONG_COUNT, max(MIN_LARGE_COUNT, of_bytes))
        if self.connection_count <= 1:
            return MAX_UNANSWERED_COUNT
        most = max(MAX_UNANSWERED_COUNT // self.connection_count, MIN_CONNECTION_COUNT)
        share = max(-(-len(self._unanswered) // self.connection_count), MIN_SHARE_COUNT)
        return min(most, share, max(MIN_LARGE_COUNT, int(MAX_EARLY_BYTES / max(self._result_bytes, 1))))

    def take(self, room: int) -> dict[int, Item]:
        """Returns the next items to send, in one message, and no more than there is room for."""
        taken: dict[int, Item] = {}
        size = 0
        for index, item in itertools.islice(self._unsent.items(), max(min(room, self._message_count), 0)):
            size += item.size
            if taken and size > MAX_MESSAGE_BYTES:
                break
            taken[index] = item
        for index in taken:
            del self._unsent[index]
        return taken

    def send_again(self, items: dict[int, Item]) -> None:
        """Adds items of a lost connection to what is to be sent, each at its place."""
        self._unsent = dict(sorted((items | self._unsent).items()))

    def open(self, header: pb.EmbedHeader) -> AnswerPlan:
        """Returns what the header of a connection promises.

        Raises:
            DataLossError: if it does not fit the options.
            FailedPreconditionError: if another model answers than before.
        """
        self._pin.check(header.model_id, header.fingerprint)
        self._plan = check_header(header, self.options, [])
        return self._plan

    def embed(self, index: int, item: Item, answer: Answer) -> None:
        """Answers an item.

        Raises:
            DataLossError: if the answer has another number of spans than the item, or of tokens than its mask.
        """
        assert self._plan is not None
        spans = span_count(item.message) if self._plan.spans else 0
        if sum(answer.span_counts) != spans:
            raise DataLossError(f"item {index} came with {sum(answer.span_counts)} of its {spans} spans; ask again")
        self.answer(index, self._result(index, item.message, answer))

    def answer(self, index: int, result: StreamResult) -> None:
        """Ends an item with its result."""
        self._unanswered_bytes -= self._unanswered.pop(index).size
        self._ready[index] = result

    def note_size(self, byte_count: int, result_count: int) -> None:
        """Learns from a message how large results are."""
        self._result_bytes += (byte_count / max(result_count, 1) - self._result_bytes) / 4

    def _result(self, index: int, message: pb.Input, answer: Answer) -> StreamResult:
        assert self._plan is not None
        if message.HasField("token_ids") and (given := message.token_ids.attention_mask):
            token_count = answer.attention_mask.shape[1]
            if len(given) != token_count:
                raise DataLossError(f"item {index} has {token_count} tokens; ask again")
            answer = answer._replace(attention_mask=np.array([given], np.int64))
        embedding = build_embedding(self._plan, answer, (message,))
        return StreamResult(index=index, error=None, _embedding=embedding)
