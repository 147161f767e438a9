"""Several connections of one stream: each item is answered once, whatever connection breaks, and in order if asked."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import answers

from layertap import DataLossError, UnavailableError
from layertap._protocol.stream_connection import StreamConnection
from layertap._protocol.stream_state import LONG_BYTES, LONG_COUNT, MAX_UNANSWERED_COUNT, StreamState
from layertap._transport.connections import Opened, Spread, least_busy
from layertap.v1 import embedding_pb2 as pb
from layertap_server.protocol import responses

GONE = UnavailableError("the server is gone")
ANSWER = answers.make([1] * 40, [answers.pooled_vectors(1, 2)], "float32")


def open_again(connection: StreamConnection) -> None:
    header = responses.header(answers.IDENTITY, ANSWER.plan)
    connection.feed(pb.EmbedStreamResponse(header=header), memoryview(b""))


def failures(*ids: int) -> pb.EmbedStreamResponse:
    failed = [pb.StreamFailure(id=one, code=3, message=str(one)) for one in ids]
    return pb.EmbedStreamResponse(results=pb.StreamResults(failures=failed))


def sent(connection: StreamConnection) -> list[int]:
    return [one.id for one in connection.take().inputs.inputs]


def sent_at_once(connection: StreamConnection) -> int:
    count = 0
    while connection.has_unsent:
        count += len(sent(connection))
    return count


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(), ordered=st.booleans())
def test_each_item_is_answered_once_whichever_connection_breaks(seed: int, ordered: bool) -> None:
    chance = random.Random(seed)
    state = StreamState(ANSWER.options, ordered=ordered, message_count=5)
    connections = [StreamConnection(state) for _ in range(3)]
    at_server: list[list[int]] = [[], [], []]
    for connection in connections:
        open_again(connection)
    for n in range(40):
        state.offer(f"text {n}")
    found: list[int] = []
    lost_count = 0
    while state.unanswered_count:
        n, step = chance.randrange(3), chance.choice(["send", "answer", "answer", "die"])
        if step == "send" and connections[n].has_unsent:
            at_server[n].extend(sent(connections[n]))
        elif step == "answer" and at_server[n]:
            connections[n].feed(failures(at_server[n].pop(0)), memoryview(b""))
        elif step == "die" and lost_count < 10:
            lost_count += bool(at_server[n])
            at_server[n].clear()
            connections[n].lost(GONE)
            open_again(connections[n])
        found.extend(result.index for result in state.ready())
    assert (found if ordered else sorted(found)) == list(range(40))


def test_items_of_a_lost_connection_go_first_and_only_the_connection_that_has_one_may_answer_it() -> None:
    state = StreamState(ANSWER.options, ordered=True, message_count=3)
    first, second = StreamConnection(state), StreamConnection(state)
    open_again(first)
    open_again(second)
    for n in range(9):
        state.offer(f"text {n}")
    assert sent(first) == [0, 1, 2] and sent(second) == [3, 4, 5]
    with pytest.raises(DataLossError, match="not waiting"):
        second.feed(failures(0), memoryview(b""))
    first.lost(GONE)
    assert sent(second) == [0, 1, 2] and sent(second) == [6, 7, 8]


def test_several_connections_share_what_may_be_unanswered_and_large_results_bound_it() -> None:
    state = StreamState(ANSWER.options, ordered=True)
    connections = [StreamConnection(state) for _ in range(4)]
    for n in range(MAX_UNANSWERED_COUNT):
        state.offer(f"text {n}")
    for connection in connections:
        open_again(connection)
    for connection in connections:
        assert sent_at_once(connection) == MAX_UNANSWERED_COUNT // 4
    for _ in range(30):
        state.note_size(1 << 20, 1)
    assert state.room_after(0) == 64 and state.room_after(50) == 0, "it goes on when a quarter is answered"


def test_no_message_is_larger_than_every_server_takes_but_one_with_a_single_item() -> None:
    state = StreamState(ANSWER.options, ordered=False)
    connection = StreamConnection(state)
    open_again(connection)
    for size in (100, 59_000, 59_000, 70_000, 300_000, 400_000, 100):
        state.offer("x" * size)
    assert state.needs_limit
    state.limit(320_000)
    state.offer("x" * 400_000)
    assert [result.index for result in state.ready()] == [5, 7] and not state.needs_limit
    messages = []
    while connection.has_unsent:
        messages.append(connection.take())
    assert [[one.id for one in message.inputs.inputs] for message in messages] == [[0, 1], [2], [3], [4], [6]]
    assert all(message.ByteSize() <= 1 << 16 for message in messages if len(message.inputs.inputs) > 1)


def test_a_server_that_states_no_limit_gets_every_item() -> None:
    state = StreamState(ANSWER.options, ordered=True)
    state.offer("x" * 400_000)
    state.limit(0)
    state.offer("x" * 400_000)
    assert not state.ready() and not state.needs_limit and state.unanswered_count == 2


@pytest.mark.parametrize(("text", "count"), [("text", LONG_COUNT), ("text" * 1000, LONG_BYTES // 4000)])
def test_the_first_connection_leaves_a_share_to_those_that_have_not_opened_yet(text: str, count: int) -> None:
    state = StreamState(ANSWER.options, ordered=True)
    first, second = StreamConnection(state), StreamConnection(state)
    open_again(first)
    state.expected_count = None
    for _ in range(1000):
        state.offer(text)
    assert state.is_long
    taken = sent_at_once(first)
    assert 0.9 * count <= taken <= count
    state.expected_count = 2
    assert not first.has_unsent
    open_again(second)
    assert 3 / 8 <= (taken + sent_at_once(first)) / 1000 <= 5 / 8, (
        "an even share; it goes on when a quarter is answered"
    )
    assert 3 / 8 <= sent_at_once(second) / 1000 <= 1 / 2


def info(process: int, count: int) -> pb.GetModelInfoResponse:
    return pb.GetModelInfoResponse(process_number=process, process_count=count)


def test_a_client_opens_connections_until_each_process_has_one() -> None:
    spread = Spread(None)
    spread.begin(info(2, 3))
    assert not spread.decided
    assert not spread.takes(info(2, 3)) and spread.takes(info(1, 3))
    assert not spread.takes(info(1, 3)) and not spread.decided
    assert spread.takes(info(3, 3)) and spread.decided


def test_a_caller_that_leaves_while_connections_are_opened_costs_none_of_them() -> None:
    spread = Spread(None)
    spread.begin(info(2, 3))
    assert spread.takes(info(1, 3))
    spread.begin(info(2, 3))
    assert not spread.decided and spread.takes(info(3, 3)) and spread.decided


@pytest.mark.parametrize(("wanted", "count", "most"), [(None, 1, 1), (None, 0, 1), (1, 8, 1), (4, 1, 4), (6, 4, 6)])
def test_it_opens_as_many_as_asked_for_and_as_pay(wanted: int | None, count: int, most: int) -> None:
    chance = random.Random(0)
    spread = Spread(wanted)
    opened = 1
    if not spread.decided:
        spread.begin(info(1 if count else 0, count))
    met = [1]
    while not spread.decided:
        process = chance.randint(1, count)
        if spread.takes(info(process, count)):
            opened += 1
            met.append(process)
    assert opened == most
    assert max(map(met.count, set(met))) <= -(-most // max(count, 1))


def test_it_keeps_what_it_gets_where_the_system_gives_it_one_process_only() -> None:
    spread = Spread(None)
    spread.begin(info(1, 2))
    tries = 0
    while not spread.decided:
        spread.takes(info(1, 2))
        tries += 1
    assert tries == 16


def test_a_call_gets_the_connection_with_the_fewest_calls() -> None:
    opened = [Opened(channel=n, lease=None, call_count=count) for n, count in enumerate((2, 1, 1))]
    assert least_busy(opened) is opened[1]
