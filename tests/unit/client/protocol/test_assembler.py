"""Frames in any order become the right arrays or a DataLossError, never wrong arrays; and what those arrays are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support import answers
from support.answers import Answer, Message
from support.messages import (
    assemble,
    check_layers,
    gather,
    opened,
    whole_frames,
)

from layertap import DataLossError, wire
from layertap._protocol.assembler import EmbedAssembler, LayerAssembler
from layertap.v1 import embedding_pb2 as pb
from layertap_server.types import Unit

MODEST = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def row_bytes(answer: Answer, frame: pb.Frame) -> int:
    return answer.plan.row_bytes(answer.plan.outputs[frame.output_index])


# What may go wrong with one frame. Each takes the frames and the position of the one to spoil.


def duplicate(answer: Answer, frames: list[Message], at: int) -> None:
    frames.insert(0, frames[at])


def drop(answer: Answer, frames: list[Message], at: int) -> None:
    del frames[at]


def overlap(answer: Answer, frames: list[Message], at: int) -> None:
    frame, data = frames[at]
    longer = pb.Frame()
    longer.CopyFrom(frame)
    longer.row_count += 1
    frames[at] = longer, data + bytes(row_bytes(answer, frame))


def shorten(answer: Answer, frames: list[Message], at: int) -> None:
    frame, data = frames[at]
    shorter = pb.Frame()
    shorter.CopyFrom(frame)
    shorter.row_count -= 1
    frames[at] = shorter, data[: -row_bytes(answer, frame)]


def wrong_size(answer: Answer, frames: list[Message], at: int) -> None:
    frames[at] = frames[at][0], frames[at][1] + b"\0"


def no_data(answer: Answer, frames: list[Message], at: int) -> None:
    frames[at] = frames[at][0], b""


def start_of(answer: Answer, frame: pb.Frame) -> int | None:
    """Returns at which row of its output a frame says that it begins; None: it names no text."""
    if not 0 <= frame.first_text < len(answer.texts):
        return None
    output = answer.plan.outputs[frame.output_index]
    return int(answer.row_starts(output)[frame.first_text]) + (0 if output.unit is Unit.TEXT else frame.first_row)


def changed(**fields: int) -> Callable[[Answer, list[Message], int], None]:
    def change(answer: Answer, frames: list[Message], at: int) -> None:
        frame = pb.Frame()
        frame.CopyFrom(frames[at][0])
        for name, step in fields.items():
            setattr(frame, name, getattr(frame, name) + step)
        if "first_text" in fields:  # Behind texts without words the same row has several names.
            assume(start_of(answer, frame) != start_of(answer, frames[at][0]))
        frames[at] = frame, frames[at][1]

    change.__name__ = f"changed({fields})"
    return change


SPOILS = [
    duplicate,
    drop,
    overlap,
    shorten,
    wrong_size,
    no_data,
    changed(layer=1),
    changed(layer=-1),
    changed(layer=99),
    changed(output_index=1),
    changed(output_index=-1),
    changed(first_text=1),
    changed(first_text=-1),
    changed(first_text=1000),
    changed(row_count=1),
    changed(row_count=-1),
    changed(row_count=-1000),
]


@MODEST
@given(data=st.data(), answer=answers.answers())
def test_any_cut_and_any_order_of_frames_gives_the_right_arrays(data: st.DataObject, answer: Answer) -> None:
    found = assemble(answer, opened(answer, data.draw(answers.cut_frames(answer))))
    answer.check(found)
    assert (found.timings.queue_time_ns, found.timings.tokenize_time_ns, found.timings.compute_time_ns) == (1, 2, 3)
    assert found.hidden_states.layer_count == answers.LAYER_COUNT


@MODEST
@given(data=st.data(), answer=answers.answers(), spoil=st.sampled_from(SPOILS))
def test_one_spoilt_frame_is_a_data_loss(
    data: st.DataObject, answer: Answer, spoil: Callable[[Answer, list[Message], int], None]
) -> None:
    frames = data.draw(answers.cut_frames(answer))
    spoil(answer, frames, data.draw(st.integers(0, len(frames) - 1), label="which"))
    with pytest.raises(DataLossError):
        assemble(answer, opened(answer, frames))


@MODEST
@given(data=st.data(), answer=answers.answers())
def test_frames_at_random_places_never_give_wrong_arrays(data: st.DataObject, answer: Answer) -> None:
    frames = data.draw(answers.cut_frames(answer))
    for _ in range(data.draw(st.integers(1, 3), label="changes")):
        at = data.draw(st.integers(0, len(frames) - 1), label="which")
        field = data.draw(st.sampled_from(["output_index", "layer", "first_text", "first_row"]))
        frame = pb.Frame()
        frame.CopyFrom(frames[at][0])
        setattr(frame, field, data.draw(st.integers(-3, 8)))
        frames[at] = frame, frames[at][1]
    places = {(f.output_index, f.layer, f.first_text, f.first_row): (f, d) for f, d in frames}
    try:
        found = assemble(answer, opened(answer, frames))
    except DataLossError:
        return
    # It fits without gap or overlap: then the arrays must hold the rows where the frames say that they belong.
    by_place = Answer(plan=answer.plan, texts=answer.texts, wanted={}, data={})
    assert len(places) == len(frames)
    for (output_index, layer), wanted in answer.wanted.items():
        output = answer.plan.outputs[output_index]
        expected, starts = np.full_like(wanted, np.nan), answer.row_starts(output)
        for frame, payload in frames:
            if (frame.output_index, frame.layer) == (output_index, layer):
                start = int(starts[frame.first_text]) + (0 if output.unit is Unit.TEXT else frame.first_row)
                place = expected[start : start + frame.row_count]
                wire.read_into(place, payload, wire.DTYPES[answer.plan.dtype])
        by_place.wanted[output_index, layer] = expected
    by_place.check(found)


@MODEST
@given(data=st.data(), answer=answers.answers(only_layers=True))
def test_layers_are_handed_out_text_by_text_each_once(data: st.DataObject, answer: Answer) -> None:
    came = list(gather(answer, opened(answer, data.draw(answers.cut_frames(answer)))))
    check_layers(answer, came)
    assert {(part.layer, text) for part in came for text in part.texts} == {
        (layer, text) for _, layer in answer.data for text in range(len(answer.texts))
    }


@MODEST
@given(data=st.data(), answer=answers.answers(only_layers=True), spoil=st.sampled_from(SPOILS))
def test_spoilt_layers_are_a_data_loss_and_what_was_handed_out_is_right(
    data: st.DataObject, answer: Answer, spoil: Callable[[Answer, list[Message], int], None]
) -> None:
    frames = data.draw(answers.cut_frames(answer))
    spoil(answer, frames, data.draw(st.integers(0, len(frames) - 1), label="which"))
    came = []
    honest = spoil in (duplicate, drop, shorten)
    with pytest.raises(DataLossError):
        for part in gather(answer, opened(answer, frames)):
            came.append(part)
    if honest:  # Else a frame told a lie that only the frames after it reveal.
        check_layers(answer, came)


def both_ends(answer: Answer, messages: list[Message]) -> None:
    """Fails unless both assemblers refuse an answer."""
    with pytest.raises(DataLossError):
        assemble(answer, messages)
    with pytest.raises(DataLossError):
        list(gather(answer, messages))


SMALL = answers.make([2, 3], [answers.hidden_states([0, 2], 4)], "float32")


def test_header_and_summary_must_come_each_once_and_in_their_places() -> None:
    header, *frames, summary = opened(SMALL, whole_frames(SMALL))
    both_ends(SMALL, [])
    both_ends(SMALL, [header, *frames])
    both_ends(SMALL, [*frames, summary])
    both_ends(SMALL, [summary])
    both_ends(SMALL, [header, summary])
    both_ends(SMALL, [header, header, *frames, summary])
    both_ends(SMALL, [frames[0], header, frames[1], summary])
    both_ends(SMALL, [header, frames[0], summary, frames[1]])
    both_ends(SMALL, [header, *frames, summary, summary])
    SMALL.check(assemble(SMALL, [header, *frames, summary]))


def test_a_summary_that_counts_otherwise_is_a_data_loss() -> None:
    for wrong in (-1, 0, 1, 3):
        messages = opened(SMALL, whole_frames(SMALL))
        messages[-1] = pb.EmbedLayersResponse(summary=pb.EmbedSummary(frame_count=wrong)), b""
        with pytest.raises(DataLossError, match="frames"):
            assemble(SMALL, messages)


@pytest.mark.parametrize("kind", [EmbedAssembler, LayerAssembler])
def test_a_frame_before_its_tensor_is_a_data_loss(kind: Any) -> None:
    # As a slice of an array, rows from -3 up to -1 would be the first two of the other text.
    assembler = kind(SMALL.messages, SMALL.options)
    list(assembler.feed(pb.EmbedLayersResponse(header=SMALL.header), memoryview(b"")) or ())
    frame = pb.EmbedLayersResponse(frame=pb.Frame(first_row=-3, row_count=2))
    with pytest.raises(DataLossError, match="2 rows at row -3"):
        list(assembler.feed(frame, memoryview(bytes(2 * 16))) or ())


def test_an_unknown_part_is_a_data_loss() -> None:
    header, *rest = opened(SMALL, whole_frames(SMALL))
    both_ends(SMALL, [header, (pb.EmbedLayersResponse(), b""), *rest])


def broken_headers() -> Iterator[Any]:
    def changed(name: str, change: Callable[[pb.EmbedHeader], Any]) -> Any:
        header = pb.EmbedHeader()
        header.CopyFrom(SMALL.header)
        change(header)
        return pytest.param(header, id=name)

    yield changed("no outputs", lambda header: header.ClearField("outputs"))
    yield changed("an output too many", lambda header: header.outputs.add(layers=[1], row_size=1))
    yield changed("no counts", lambda header: header.ClearField("token_counts"))
    yield changed("a text too many", lambda header: header.token_counts.append(1))
    yield changed("a negative count", lambda header: header.token_counts.__setitem__(0, -2))
    yield changed("a negative total", lambda header: header.token_counts.__setitem__(0, -7))
    yield changed("a negative row size", lambda header: setattr(header.outputs[0], "row_size", -4))
    yield changed("an unknown dtype", lambda header: setattr(header, "dtype", 9))
    yield changed("no dtype", lambda header: header.ClearField("dtype"))
    yield changed("truncated of one text only", lambda header: header.truncated.pop())
    yield changed("a layer that was not asked for", lambda header: header.outputs[0].layers.append(3))
    yield changed("a layer missing", lambda header: header.outputs[0].layers.pop())
    yield changed("rows of texts instead of tokens", lambda header: header.outputs[0].ClearField("unit"))


UNREAD_BY_LAYERS = {
    "an output too many",
    "truncated of one text only",
    "rows of texts instead of tokens",
}
"""What `embed_layers` has no use for, and need not look at."""


@pytest.mark.parametrize("header", list(broken_headers()))
def test_a_header_that_is_not_that_of_the_request_is_a_data_loss(header: pb.EmbedHeader) -> None:
    messages = opened(SMALL, whole_frames(SMALL))
    with pytest.raises(DataLossError):
        assemble(SMALL, [(pb.EmbedLayersResponse(header=header), b""), *messages[1:]])


@pytest.mark.parametrize("header", [one for one in broken_headers() if one.id not in UNREAD_BY_LAYERS])
def test_layers_under_a_broken_header_are_a_data_loss(header: pb.EmbedHeader) -> None:
    messages = opened(SMALL, whole_frames(SMALL))
    with pytest.raises(DataLossError):
        list(gather(SMALL, [(pb.EmbedLayersResponse(header=header), b""), *messages[1:]]))


def test_a_pooler_of_two_layers_is_a_data_loss() -> None:
    answer = answers.make([2], [answers.pooler_output(3)], "float32")
    header = answer.header
    header.outputs[0].layers.append(answers.LAYER_COUNT + 1)
    frames = [
        (pb.Frame(layer=layer, row_count=1), answer.data[0, answers.LAYER_COUNT]) for layer in header.outputs[0].layers
    ]
    _, *rest = opened(answer, frames)
    with pytest.raises(DataLossError):
        assemble(answer, [(pb.EmbedLayersResponse(header=header), b""), *rest])
