"""The memory of an `embed_stream`: each item answered once, in order, through any number of lost connections."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import answers
from support.streams import ANSWER, GONE, OneConnection, failure, frames, open_again, opened, packed, send_all

from layertap import DataLossError, FailedPreconditionError, InvalidArgumentError, StreamResult, UnavailableError
from layertap._protocol import stream_state
from layertap.v1 import embedding_pb2 as pb
from layertap_server.protocol import responses

MODEST = settings(max_examples=60, deadline=None)


def check(results: list[StreamResult], indices: Sequence[int]) -> None:
    assert [result.index for result in results] == list(indices)
    for result in results:
        assert result.error is None
        ANSWER.check_one(result.embedding, result.index)


def test_items_leave_in_order_with_their_positions_as_ids_and_answers_come_back() -> None:
    to = opened()
    assert to.unanswered_count == 6 and to.has_unsent
    request = to.take()
    assert [one.id for one in request.inputs.inputs] == list(range(6)) and not to.has_unsent
    assert [list(one.input.token_ids.input_ids) for one in request.inputs.inputs] == [
        text.input_ids.tolist() for text in ANSWER.texts
    ]
    to.feed(*packed([0, 1, 2]))
    check(to.ready(), [0, 1, 2])
    assert to.ready() == [] and to.unanswered_count == 3
    for message in frames(3):
        assert to.ready() == []
        to.feed(*message)
    check(to.ready(), [3])
    to.feed(*packed([4, 5]))
    check(to.ready(), [4, 5])
    assert not to.unanswered_count and to.ready() == []


def test_the_opening_carries_options_and_order() -> None:
    for ordered, order in ((True, pb.RESULT_ORDER_AS_SENT), (False, pb.RESULT_ORDER_AS_FINISHED)):
        opening = OneConnection(ANSWER.options, ordered=ordered).opening
        assert opening.options.options == ANSWER.options and opening.options.order == order


def test_early_answers_are_held_back_only_if_order_is_asked() -> None:
    for ordered in (True, False):
        to = opened(ordered=ordered)
        send_all(to)
        to.feed(*packed([2, 1]))
        check(to.ready(), [] if ordered else [2, 1])
        to.feed(*packed([0]))
        check(to.ready(), [0, 1, 2] if ordered else [0])


def test_an_item_that_is_no_input_is_answered_in_its_place_and_never_sent() -> None:
    to = opened(offered=1)
    to.offer(object())
    to.offer([])
    to.offer(ANSWER.texts[3].input_ids.tolist())
    assert send_all(to) == [0, 3]
    assert to.ready() == []
    to.feed(*packed([0]))
    first, second, third = to.ready()
    check([first], [0])
    for index, result in ((1, second), (2, third)):
        assert result.index == index and isinstance(result.error, InvalidArgumentError)
        assert f"inputs[{index}]" in result.error.details
    to.feed(*packed([3]))
    check(to.ready(), [3])


def test_a_failure_in_band_is_the_error_of_its_item_alone() -> None:
    to = opened()
    send_all(to)
    to.feed(*packed([0]))
    to.feed(*failure(1, 11))
    to.feed(*failure(2, 99))
    to.feed(*packed([3]))
    first, second, third, fourth = to.ready()
    check([first], [0])
    check([fourth], [3])
    assert (second.index, second.error.code.name) == (1, "OUT_OF_RANGE")
    assert (third.index, third.error.code.name) == (2, "UNKNOWN")
    assert second.error.details == "item 1 is at fault"


def test_after_a_lost_connection_only_what_is_unanswered_is_sent_again() -> None:
    to = opened()
    assert send_all(to) == [0, 1, 2, 3, 4, 5]
    to.feed(*packed([0, 2]))
    to.feed(*frames(3)[0])
    check(to.ready(), [0])
    to.lost(GONE)
    open_again(to)
    assert send_all(to) == [1, 3, 4, 5]
    to.feed(*packed([1]))
    check(to.ready(), [1, 2])
    for message in frames(3, step=2):
        to.feed(*message)
    to.feed(*packed([4, 5]))
    check(to.ready(), [3, 4, 5])
    assert not to.unanswered_count and not to.has_unsent


def test_an_item_in_flight_at_three_connections_that_got_nowhere_is_given_up_and_no_other() -> None:
    to = opened(offered=2)
    for round_count in range(4):
        assert send_all(to) == [[0, 1], [0, 1], [0], [0]][round_count]
        if round_count == 1:
            to.feed(*packed([1]))  # This one got on: its loss says nothing of what was in flight.
        if round_count == 3:
            to.offer(ANSWER.texts[2].input_ids.tolist())
        to.lost(GONE)
        open_again(to)
        if round_count < 3:
            assert to.ready() == []
    given_up, answered = to.ready()
    assert given_up.index == 0 and isinstance(given_up.error, UnavailableError)
    assert "item 0" in given_up.error.details and "3 lost connections" in given_up.error.details
    assert "the server is gone" in given_up.error.details
    check([answered], [1])
    assert send_all(to) == [2]
    to.feed(*packed([2]))
    check(to.ready(), [2])


def test_what_was_never_sent_is_never_given_up() -> None:
    to = opened(offered=2)
    for _ in range(10):
        to.lost(GONE)
        open_again(to)
    assert to.ready() == [] and send_all(to) == [0, 1]


def test_connections_that_never_opened_are_not_held_against_an_item() -> None:
    """While a server restarts, attempts to connect fail: that says nothing of the items."""
    to = opened(offered=2)
    send_all(to)
    to.lost(GONE)
    for _ in range(10):
        send_all(to)
        to.lost(GONE)
    open_again(to)
    assert send_all(to) == [0, 1] and to.ready() == []


def test_another_model_is_refused_and_the_same_one_is_not() -> None:
    to = opened()
    send_all(to)
    to.lost(GONE)
    header = responses.header(answers.IDENTITY, ANSWER.plan)
    header.fingerprint = "e" * 64
    with pytest.raises(FailedPreconditionError, match="another model"):
        to.feed(pb.EmbedStreamResponse(header=header), memoryview(b""))
    other = opened()
    other.lost(GONE)
    open_again(other)
    other.lost(GONE)
    with pytest.raises(FailedPreconditionError, match="ffffffffffff"):
        other.feed(pb.EmbedStreamResponse(header=header), memoryview(b""))


def test_items_and_bytes_ahead_are_bounded() -> None:
    to = OneConnection(ANSWER.options, ordered=True)
    count = 0
    while to.has_room:
        to.offer("x")
        count += 1
    assert count == stream_state.MAX_UNANSWERED_COUNT
    open_again(to)
    sent = send_all(to)
    assert sent == list(range(count)) and not to.has_room
    quarter = count // 4
    for index in range(quarter + 1):
        assert not to.has_room, "it goes on when a quarter is answered: each answer must not call for a message"
        to.feed(*failure(index))
    assert not to.has_room, "an answer that was not handed out takes room too"
    assert len(to.ready()) == quarter + 1 and to.has_room
    large = OneConnection(ANSWER.options, ordered=True)
    while large.has_room:
        large.offer("x" * (1 << 20))
        count += 1
    assert large.unanswered_count == stream_state.MAX_UNANSWERED_BYTES >> 20
    open_again(large)
    send_all(large)
    for index in range(3):
        assert not large.has_room
        large.feed(*failure(index))
        large.ready()
    assert large.has_room


def test_messages_are_bounded() -> None:
    to = OneConnection(ANSWER.options, ordered=True)
    for _ in range(1000):
        to.offer("short")
    while to.has_unsent:
        assert 1 <= len(to.take().inputs.inputs) <= stream_state.MAX_MESSAGE_COUNT
    for _ in range(20):
        to.offer("x" * 100_000)
    to.offer("x" * 2_000_000)
    while to.has_unsent:
        assert to.take().ByteSize() <= stream_state.MAX_MESSAGE_BYTES + 2_000_100


def spoilt() -> Iterator[Any]:
    def case(name: str, *messages: tuple[pb.EmbedStreamResponse, memoryview]) -> Any:
        return pytest.param(messages, id=name)

    def with_results(change: Callable[[pb.StreamResults], Any]) -> tuple[pb.EmbedStreamResponse, memoryview]:
        part, data = packed([0, 1])
        change(part.results)
        return part, data

    def with_frame(at: int, **fields: int) -> list[tuple[pb.EmbedStreamResponse, memoryview]]:
        messages = frames(2)
        for name, value in fields.items():
            setattr(messages[at][0].frame, name, value)
        return messages

    yield case("an id that was not sent", with_results(lambda results: results.ids.__setitem__(0, 77)))
    yield case("a negative id", with_results(lambda results: results.ids.__setitem__(0, -1)))
    yield case("an id twice in a message", with_results(lambda results: results.ids.__setitem__(1, 0)))
    yield case("an id answered before", packed([0]), packed([0]))
    yield case("a failure of an unknown id", failure(77))
    yield case("a failure for whom there is an answer", packed([0]), failure(0))
    yield case("a header again", (pb.EmbedStreamResponse(header=responses.header(answers.IDENTITY, ANSWER.plan)), b""))
    yield case("an unknown part", (pb.EmbedStreamResponse(), memoryview(b"")))
    yield case("counts for fewer", with_results(lambda results: results.token_counts.pop()))
    yield case("truncated for fewer", with_results(lambda results: results.truncated.pop()))
    yield case("timings for fewer", with_results(lambda results: results.timings.pop()))
    yield case("ids for fewer", with_results(lambda results: results.ids.pop()))
    yield case("another count", with_results(lambda results: results.token_counts.__setitem__(0, 3)))
    yield case("a negative count", with_results(lambda results: results.token_counts.__setitem__(0, -5)))
    yield case("data missing", (packed([0, 1])[0], packed([0, 1])[1][:-1]))
    yield case("data too much", (packed([0, 1])[0], memoryview(bytes(packed([0, 1])[1]) + b"\0")))
    yield case("no data", (packed([0, 1])[0], memoryview(b"")))
    yield case("a frame of an unknown id", *with_frame(0, id=77))
    yield case("a frame twice", frames(2)[0], frames(2)[0])
    yield case("frames in another order", *frames(2)[1::-1])
    yield case("a frame missing", *frames(2)[:1], *frames(2)[2:])
    yield case("the first frame missing", *frames(2)[1:])
    yield case("done too early", *with_frame(0, done=True)[:1])
    yield case("a frame of another layer", *with_frame(0, layer=1))
    yield case("a frame of another output", *with_frame(0, output_index=5))
    yield case("a frame of too many rows", *with_frame(0, row_count=2))
    yield case("a frame of no rows", *with_frame(0, row_count=0))
    yield case("a frame of less than no rows", *with_frame(0, row_count=-1))
    yield case("a frame of a negative row", *with_frame(0, first_row=-1))
    yield case("a frame past the end", *with_frame(2, first_row=3))
    yield case("frames that count more tokens", *with_frame(0, token_count=4))
    yield case("frames that count less than no tokens", *with_frame(0, token_count=-4))
    yield case("a last frame that counts otherwise", *with_frame(-1, token_count=2))


@pytest.mark.parametrize("messages", list(spoilt()))
def test_what_does_not_fit_is_a_data_loss(messages: Sequence[tuple[pb.EmbedStreamResponse, memoryview]]) -> None:
    to = opened()
    send_all(to)
    with pytest.raises(DataLossError):
        for message in messages:
            to.feed(*message)


@pytest.mark.parametrize("change", ["input_ids", "tokens", "word_ids", "offset_mapping"])
def test_tokens_of_another_length_are_a_data_loss(change: str) -> None:
    answer = answers.make([2, 2], [answers.pooled_vectors(1, 2)], "float32", return_tokens=True)
    text = pb.TokenizedText(
        tokens=["a", "b"],
        input_ids=[1, 2],
        attention_mask=[1, 1],
        token_type_ids=[0, 0],
        special_tokens_mask=[0, 0],
        offset_mapping=[0, 1, 0, 1],
        word_ids=[0, 0],
    )
    part, data = packed([0, 1], answer)
    part.results.tokens.extend([text, text])
    to = opened(answer)
    send_all(to)
    getattr(part.results.tokens[0], change).pop()
    with pytest.raises(DataLossError):
        to.feed(part, data)


@pytest.mark.parametrize("count", [0, 1])
def test_tokens_that_were_asked_for_and_are_missing_are_a_data_loss(count: int) -> None:
    answer = answers.make([2, 2], [answers.pooled_vectors(1, 2)], "float32", return_tokens=True)
    part, data = packed([0, 1], answer)
    part.results.tokens.extend([pb.TokenizedText()] * count)
    to = opened(answer)
    send_all(to)
    with pytest.raises(DataLossError):
        to.feed(part, data)


def test_a_connection_must_open_with_a_header() -> None:
    to = OneConnection(ANSWER.options, ordered=True)
    to.offer("x")
    with pytest.raises(DataLossError, match="header"):
        to.feed(*failure(0))
    wrong = responses.header(answers.IDENTITY, ANSWER.plan)
    wrong.outputs.pop()
    with pytest.raises(DataLossError, match="header"):
        to.feed(pb.EmbedStreamResponse(header=wrong), memoryview(b""))


@MODEST
@given(data=st.data(), ordered=st.booleans())
def test_whatever_happens_each_item_is_answered_once(data: st.DataObject, ordered: bool) -> None:
    """A server that answers in any order and dies at any time, at most twice while an item is in flight."""
    count = data.draw(st.integers(1, 12))
    answer = answers.make(
        data.draw(st.lists(st.integers(1, 3), min_size=count, max_size=count)),
        [answers.hidden_states([1, 2], 2), answers.pooled_vectors(0, 1)],
        "float32",
    )
    to = OneConnection(answer.options, ordered=ordered)
    open_again(to, answer)
    offered, lost_count = 0, 0
    at_server: list[int] = []
    results: list[StreamResult] = []
    while offered < count or to.unanswered_count:
        step = data.draw(st.sampled_from(["offer", "send", "answer", "frames", "die"]))
        if step == "offer" and offered < count:
            to.offer(answer.texts[offered].input_ids.tolist())
            offered += 1
        elif step == "die" and lost_count < 2:
            at_server.clear()
            to.lost(GONE)
            open_again(to, answer)
            lost_count += 1
        elif step in ("answer", "frames") and at_server:
            chosen = [at_server.pop(0)] if ordered else [at_server.pop(data.draw(st.integers(0, len(at_server) - 1)))]
            for message in [packed(chosen, answer)] if step == "answer" else frames(chosen[0], answer):
                to.feed(*message)
        elif to.has_unsent:
            at_server.extend(one.id for one in to.take().inputs.inputs)
        elif at_server:
            to.feed(*packed([at_server.pop(0)], answer))
        elif offered < count:
            to.offer(answer.texts[offered].input_ids.tolist())
            offered += 1
        results.extend(to.ready())
    indices = [result.index for result in results]
    assert (indices if ordered else sorted(indices)) == list(range(count))
    for result in results:
        assert result.error is None
        answer.check_one(result.embedding, result.index)
