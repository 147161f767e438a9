"""A stream over one connection as one object, and messages that answer its items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layertap import UnavailableError
from layertap._protocol.stream_connection import StreamConnection
from layertap._protocol.stream_state import StreamState
from layertap.v1 import embedding_pb2 as pb
from layertap_server.protocol import responses
from support import answers
from support.answers import Answer

_OF_CONNECTION = ("accepted", "feed", "lost", "take")

TIMINGS = pb.Timings(queue_time_ns=1, tokenize_time_ns=2, compute_time_ns=3)

ANSWER = answers.make([2, 1, 3, 2, 1, 2], [answers.hidden_states([0, 2], 3), answers.pooled_vectors(1, 2)], "float32")
GONE = UnavailableError("the server is gone")


class OneConnection:
    """A `StreamState` with the methods of its only `StreamConnection`."""

    def __init__(self, options: pb.EmbedOptions, *, state: StreamState | None = None, **settings: Any) -> None:
        self._state = state or StreamState(options, **settings)
        self._connection = StreamConnection(self._state)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection if name in _OF_CONNECTION else self._state, name)


def opened(answer: Answer = ANSWER, *, ordered: bool = True, offered: int | None = None) -> OneConnection:
    """Returns a ledger whose connection has opened, with the texts of an answer offered."""
    made = OneConnection(answer.options, ordered=ordered)
    for text in answer.texts[:offered]:
        made.offer(text.input_ids.tolist())
    open_again(made, answer)
    return made


def open_again(to: OneConnection, answer: Answer = ANSWER) -> None:
    to.feed(pb.EmbedStreamResponse(header=responses.header(answers.IDENTITY, answer.plan)), memoryview(b""))


def send_all(of: OneConnection) -> list[int]:
    """Takes everything that is to be sent; returns the ids."""
    ids = []
    while of.has_unsent:
        ids.extend(one.id for one in of.take().inputs.inputs)
    return ids


def packed(indices: Sequence[int], answer: Answer = ANSWER) -> tuple[pb.EmbedStreamResponse, memoryview]:
    """Returns the message that answers some texts whole."""
    data = b"".join(one_text(answer, key, index) for key in answer.data for index in indices)
    results = pb.StreamResults(
        ids=indices,
        token_counts=[answer.counts[n] for n in indices],
        truncated=[answer.tokenized[n].truncated for n in indices],
        timings=[TIMINGS] * len(indices),
    )
    return pb.EmbedStreamResponse(results=results), memoryview(data)


def one_text(answer: Answer, key: tuple[int, int], index: int) -> bytes:
    """Returns the bytes of one text in one tensor."""
    output = answer.plan.outputs[key[0]]
    starts, row_bytes = answer.row_starts(output), answer.plan.row_bytes(output)
    return answer.data[key][starts[index] * row_bytes : starts[index + 1] * row_bytes]


def frames(index: int, answer: Answer = ANSWER, step: int = 1) -> list[tuple[pb.EmbedStreamResponse, memoryview]]:
    """Returns the frames that answer one text, `step` rows each."""
    messages = []
    for output_index, layer in answer.data:
        output = answer.plan.outputs[output_index]
        data, row_bytes = one_text(answer, (output_index, layer), index), answer.plan.row_bytes(output)
        for first in range(0, len(data) // row_bytes, step):
            part = data[first * row_bytes : (first + step) * row_bytes]
            frame = pb.StreamFrame(
                id=index,
                output_index=output_index,
                layer=layer,
                first_row=first,
                row_count=len(part) // row_bytes,
                token_count=answer.counts[index],
                truncated=answer.tokenized[index].truncated,
            )
            messages.append((pb.EmbedStreamResponse(frame=frame), memoryview(part)))
    messages[-1][0].frame.done = True
    messages[-1][0].frame.timings.CopyFrom(TIMINGS)
    return messages


def failure(index: int, code: int = 3) -> tuple[pb.EmbedStreamResponse, memoryview]:
    failed = pb.StreamFailure(id=index, code=code, message=f"item {index} is at fault")
    return pb.EmbedStreamResponse(results=pb.StreamResults(failures=[failed])), memoryview(b"")
