"""Frames in any order become the right arrays or a DataLossError, never wrong arrays; and what those arrays are."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support import answers
from support.answers import Answer, Message
from support.streams import OneConnection

import layertap
from layertap import DataLossError, Embedding, LayerRows, LayertapError, StreamResult, wire
from layertap._protocol.assembler import EmbedAssembler, LayerAssembler
from layertap._protocol.responses import ModelPin, read_embedding
from layertap._protocol.result_builder import build_tokens
from layertap.results.attentions import Attentions
from layertap.v1 import embedding_pb2 as pb
from layertap_server.model.tokenized import Tokenized
from layertap_server.observability.call_log import Record
from layertap_server.protocol import responses
from layertap_server.protocol.frames import frames_of
from layertap_server.protocol.stream_responses import Result, split_run
from layertap_server.protocol.stream_responses import messages as messages_of
from layertap_server.types import Text, Unit

MODEST = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TIMINGS = pb.Timings(queue_time_ns=1, tokenize_time_ns=2, compute_time_ns=3)


class Vocabulary:
    """What an answer asks of a tokenizer: the spelling of ids, here their numbers, and which are special."""

    special_token_ids = (101, 102)

    def pieces(self, text: Text) -> list[str]:
        return [str(token_id) for token_id in text.input_ids]


@pytest.fixture(scope="session")
def tokenizer() -> Vocabulary:
    return Vocabulary()


def opened(answer: Answer, frames: Iterable[Message]) -> list[Message]:
    """Returns the whole answer as messages: header, frames, summary."""
    parts = [(pb.EmbedLayersResponse(frame=frame), data) for frame, data in frames]
    summary = pb.EmbedSummary(frame_count=len(parts), timings=TIMINGS)
    words = responses.word_groups(answer.tokenized, 1 << 20) if answer.plan.has_words else ()
    return [
        (pb.EmbedLayersResponse(header=answer.header), b""),
        *((group, b"") for group in words),
        *parts,
        (pb.EmbedLayersResponse(summary=summary), b""),
    ]


def assemble(answer: Answer, messages: Iterable[Message]) -> Embedding:
    assembler = EmbedAssembler(answer.messages, answer.options)
    for part, data in messages:
        assembler.feed(part, memoryview(data))
    return assembler.finish()


def gather(answer: Answer, messages: Iterable[Message]) -> Iterator[LayerRows]:
    assembler = LayerAssembler(answer.messages, answer.options)
    for part, data in messages:
        yield from assembler.feed(part, memoryview(data))
    assembler.finish()


def whole_frames(answer: Answer) -> list[Message]:
    """Returns one frame for each tensor."""
    return [
        (
            pb.Frame(
                output_index=output_index,
                layer=layer,
                row_count=int(answer.row_starts(answer.plan.outputs[output_index])[-1]),
            ),
            data,
        )
        for (output_index, layer), data in answer.data.items()
    ]


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


def check_layers(answer: Answer, came: list[LayerRows]) -> None:
    """Fails unless each text of each layer came at most once, with the right rows."""
    seen: set[tuple[int, int]] = set()
    starts = answer.row_starts(answer.plan.outputs[0])
    for part in came:
        assert len(part.texts) == len(part.rows) > 0
        for text, rows in zip(part.texts, part.rows, strict=True):
            assert (part.layer, text) not in seen
            seen.add((part.layer, text))
            answers.same(rows, answer.wanted[0, part.layer][starts[text] : starts[text + 1]])
            assert rows.flags.c_contiguous and rows.flags.aligned and rows.flags.writeable


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


def test_a_frame_before_its_tensor_is_a_data_loss() -> None:
    # As a slice of an array, rows from -3 up to -1 would be the first two of the other text.
    header, *_, summary = opened(SMALL, whole_frames(SMALL))
    frame = pb.Frame(first_row=-3, row_count=2), bytes(2 * 16)
    both_ends(SMALL, [header, (pb.EmbedLayersResponse(frame=frame[0]), frame[1]), summary])


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


# Words.

WORDED = answers.make(
    [5, 9, 3], [answers.word_vectors([1, 2], 3), answers.as_mix(answers.word_vectors([0], 2), [2, 0])], "float32"
)


def test_words_come_in_groups_below_the_frame_size() -> None:
    answer = answers.make([40, 90, 1, 30, 2] * 4, [answers.word_vectors([1], 1)], "float32")
    groups = list(responses.word_groups(answer.tokenized, 2000))
    assert len(groups) > 2 and all(group.ByteSize() <= 2000 for group in groups)
    messages = opened(answer, whole_frames(answer))
    messages[1:1] = [(group, b"") for group in groups]
    assembler = EmbedAssembler(answer.messages, answer.options)
    for part, data in messages:
        if part.WhichOneof("part") != "words" or part in groups:
            assembler.feed(part, memoryview(data))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda header: header.word_counts.pop(),
        lambda header: header.word_counts.append(1),
        lambda header: header.word_counts.__setitem__(0, -1),
        lambda header: header.word_counts.__setitem__(0, header.word_counts[0] + 1),
        lambda header: header.ClearField("word_counts"),
        lambda header: setattr(header.outputs[0], "unit", pb.ROW_UNIT_TOKEN),
        lambda header: header.outputs[0].mixed_layers.append(1),
        lambda header: header.outputs[1].ClearField("mixed_layers"),
        lambda header: header.outputs[1].layers.append(3),
    ],
)
def test_a_header_whose_words_or_mixes_are_not_those_of_the_request(spoil: Callable[[pb.EmbedHeader], Any]) -> None:
    (header, _), *rest = opened(WORDED, whole_frames(WORDED))
    spoil(header.header)
    with pytest.raises(DataLossError):
        assemble(WORDED, [(header, b""), *rest])


def test_words_that_are_missing_or_of_other_lengths_are_a_data_loss() -> None:
    header, (words, _), *rest = opened(WORDED, whole_frames(WORDED))
    WORDED.check(assemble(WORDED, [header, (words, b""), *rest]))
    for wrong in ([], [(words, b""), (words, b"")]):
        with pytest.raises(DataLossError):
            assemble(WORDED, [header, *wrong, *rest])
    for spoil in (
        lambda text: text.piece_counts.append(1),
        lambda text: text.offsets.append(1),
        lambda text: setattr(text, "first_word_count", -1),
        lambda text: setattr(text, "first_word_count", 1000),
    ):
        other = pb.EmbedLayersResponse()
        other.CopyFrom(words)
        spoil(other.words.texts[1])
        with pytest.raises(DataLossError):
            assemble(WORDED, [header, (other, b""), *rest])


def test_words_of_a_stream_that_do_not_fit_are_a_data_loss(tokenizer: Vocabulary) -> None:
    spoils: list[Callable[[Any], Any]] = [
        lambda words: words.ClearField("piece_counts"),
        lambda words: words.piece_counts.append(1),
        lambda words: words.offsets.append(1),
        lambda words: setattr(words, "first_word_count", -1),
    ]
    for most, spoil in itertools.product((1 << 14, 400), [*spoils, None]):
        ledger = sent_ledger(WORDED)
        ledger.feed(stream_header(WORDED), memoryview(b""))
        with pytest.raises(DataLossError):
            for raw, _ in messages_of(stream_results(WORDED), WORDED.plan, tokenizer, most):
                part, payload = wire.split(pb.EmbedStreamResponse, raw)
                holder = part.results if part.WhichOneof("part") == "results" else part.frame
                if spoil is None:
                    holder.ClearField("words")
                elif part.WhichOneof("part") == "results":
                    list(map(spoil, holder.words))
                elif holder.done:
                    spoil(holder.words)
                ledger.feed(part, payload)


# Tokens.


def tokens_of(answer: Answer, tokenizer: Vocabulary, max_frame_bytes: int = 1 << 14) -> list[Message]:
    groups = responses.token_groups(answer.tokenized, tokenizer, max_frame_bytes)
    return [(group, b"") for group in groups]


def test_tokens_come_in_groups_below_the_frame_size(tokenizer: Vocabulary) -> None:
    answer = answers.make([5, 9, 1, 30, 2] * 4, [answers.hidden_states([1], 1)], "float32", return_tokens=True)
    groups = tokens_of(answer, tokenizer, 2000)
    assert len(groups) > 2 and all(group.ByteSize() <= 2000 for group, _ in groups)
    header, *rest = opened(answer, whole_frames(answer))
    found = assemble(answer, [header, *groups, *rest])
    answer.check(found)
    assert found.tokens.token_counts.tolist() == answer.counts
    for row, text in zip(found.tokens.input_ids, answer.texts, strict=True):
        assert row[: text.token_count].tolist() == text.input_ids.tolist()
        assert not row[text.token_count :].any()


def test_tokens_that_are_missing_or_come_twice_are_a_data_loss(tokenizer: Vocabulary) -> None:
    answer = answers.make([5, 9, 3], [answers.hidden_states([1], 1)], "float32", return_tokens=True)
    groups = tokens_of(answer, tokenizer, 500)
    assert len(groups) >= 2
    header, *rest = opened(answer, whole_frames(answer))
    for wrong in ([], groups[:-1], groups[1:], [*groups, groups[-1]], groups[::-1]):
        with pytest.raises(DataLossError):
            assemble(answer, [header, *wrong, *rest])


def test_tokens_of_other_lengths_than_the_header_says_are_a_data_loss(tokenizer: Vocabulary) -> None:
    answer = answers.make([5, 9], [answers.hidden_states([1], 1)], "float32", return_tokens=True)
    ((group, _),) = tokens_of(answer, tokenizer)
    header, *rest = opened(answer, whole_frames(answer))
    for name in ("tokens", "input_ids", "attention_mask", "token_type_ids", "special_tokens_mask", "word_ids"):
        wrong = pb.EmbedLayersResponse()
        wrong.CopyFrom(group)
        getattr(wrong.tokens.texts[0], name).pop()
        with pytest.raises(DataLossError):
            assemble(answer, [header, (wrong, b""), *rest])
    group.tokens.texts[1].offset_mapping.pop()
    with pytest.raises(DataLossError):
        assemble(answer, [header, (group, b""), *rest])


# The server's cutter and the client's assembler, end to end.


def split_all(raws: Iterable[bytes], kind: type[Any], most: int) -> list[tuple[Any, memoryview]]:
    messages = []
    for raw in raws:
        assert len(raw) <= most
        messages.append(wire.split(kind, raw))
    return messages


@MODEST
@given(data=st.data(), answer=answers.answers(max_count=40, max_texts=6), most=st.integers(280, 700))
def test_what_the_server_cuts_the_client_puts_together(data: st.DataObject, answer: Answer, most: int) -> None:
    text_count = len(answer.texts)
    cuts = sorted({0, text_count, *data.draw(st.lists(st.integers(0, text_count), max_size=3), label="batches")})
    ready = [part for first, last in itertools.pairwise(cuts) for part in answer.ready(first, last)]
    ready = data.draw(st.permutations(ready))
    raws = [raw for part in ready for raw in frames_of(part, answer.plan, most)]
    frames = [(part.frame, bytes(payload)) for part, payload in split_all(raws, pb.EmbedLayersResponse, most)]
    answer.check(assemble(answer, opened(answer, frames)))
    if len(answer.plan.outputs) == 1 and answer.plan.outputs[0].unit is Unit.TOKEN:
        came = list(gather(answer, opened(answer, frames)))
        check_layers(answer, came)
        assert sum(len(part.texts) for part in came) == text_count * len(answer.data)


@MODEST
@given(data=st.data(), answer=answers.answers())
def test_a_unary_answer_becomes_the_right_arrays(data: st.DataObject, answer: Answer) -> None:
    text_count = len(answer.texts)
    cuts = sorted({0, text_count, *data.draw(st.lists(st.integers(0, text_count), max_size=3), label="batches")})
    ready = [part for first, last in itertools.pairwise(cuts) for part in answer.ready(first, last)]
    tensors = b"".join(responses._tensors(data.draw(st.permutations(ready)), answer.plan))
    record = Record(method="Embed", request_id="1", client="me")
    record.tokenize.note(1, 6)
    message = pb.EmbedResponse(header=answer.header, timings=responses.timings(record))
    if answer.plan.has_words:
        message.words.extend(map(responses.words, answer.tokenized))
    raw = message.SerializeToString() + tensors
    found = read_embedding(pb.EmbedResponse.FromString(raw), answer.messages, answer.options, ModelPin())
    answer.check(found)
    assert found.timings.tokenize_time_ns == 5
    for spoil in (
        lambda wrong: wrong.tensors.pop(),
        lambda wrong: setattr(wrong.tensors[0], "layer", 77),
        lambda wrong: wrong.tensors[0].tensor.shape.__setitem__(0, wrong.tensors[0].tensor.shape[0] + 1),
        lambda wrong: setattr(wrong.tensors[0].tensor, "data", wrong.tensors[0].tensor.data[:-1] or b"?"),
        lambda wrong: wrong.tensors.append(wrong.tensors[0]),
        lambda wrong: wrong.ClearField("header"),
    ):
        wrong = pb.EmbedResponse.FromString(raw)
        spoil(wrong)
        with pytest.raises(DataLossError):
            read_embedding(wrong, answer.messages, answer.options, ModelPin())


def stream_results(answer: Answer) -> list[Result]:
    (parts,) = [split_run(list(answer.ready(0, len(answer.texts))), answer.plan)]
    return [Result(id=n, tokenized=one, parts=parts[n], timings=TIMINGS) for n, one in enumerate(answer.tokenized)]


def sent_ledger(answer: Answer, *, ordered: bool = True) -> OneConnection:
    """Returns a ledger that waits for the answers to all texts."""
    ledger = OneConnection(answer.options, ordered=ordered)
    for text in answer.texts:
        ledger.offer(text.input_ids.tolist())
    while ledger.has_unsent:
        ledger.take()
    return ledger


def stream_header(answer: Answer) -> pb.EmbedStreamResponse:
    return pb.EmbedStreamResponse(header=responses.header(answers.IDENTITY, answer.plan))


@MODEST
@given(data=st.data(), answer=answers.answers(max_count=40, max_texts=6), most=st.integers(400, 2000))
def test_what_the_server_packs_or_spreads_the_ledger_unpacks(
    tokenizer: Vocabulary, data: st.DataObject, answer: Answer, most: int
) -> None:
    most += 1024 * answer.plan.has_words  # A list of words is not cut.
    results = stream_results(answer)
    bad = data.draw(st.sets(st.integers(0, len(results) - 1)), label="failed texts")
    for n in bad:
        results[n] = Result(id=n, error=layertap.OutOfRangeError(f"item {n}: too large"))
    ledger = sent_ledger(answer)
    ledger.feed(stream_header(answer), memoryview(b""))
    answered = []
    completed = []
    for raw, done in messages_of(results, answer.plan, tokenizer, most):
        completed.extend(result.id for result in done)
        for part, payload in split_all([raw], pb.EmbedStreamResponse, most):
            ledger.feed(part, payload)
        answered.extend(ledger.ready())
        assert [result.index for result in answered] == completed
    assert completed == list(range(len(results)))
    assert not ledger.unanswered_count
    for result in answered:
        if result.index in bad:
            assert isinstance(result.error, layertap.OutOfRangeError)
            assert result.error.details == f"item {result.index}: too large"
            with pytest.raises(layertap.OutOfRangeError):
                _ = result.embedding
        else:
            assert result.error is None
            answer.check_one(result.embedding, result.index)


def test_small_results_share_a_message_and_large_ones_are_spread(tokenizer: Vocabulary) -> None:
    small = answers.make([3] * 50, [answers.pooled_vectors(2, 4)], "float32")
    assert len(list(messages_of(stream_results(small), small.plan, tokenizer, 1 << 14))) == 1
    many = stream_results(answers.make([1] * 1200, [answers.pooled_vectors(2, 4)], "float32"))
    assert [len(done) for _, done in messages_of(many, small.plan, tokenizer, 1 << 20)] == [512, 512, 176]
    large = answers.make([40, 2, 40], [answers.hidden_states([0, 1, 4], 32)], "float32")
    messages = list(messages_of(stream_results(large), large.plan, tokenizer, 2000))
    kinds = [wire.split(pb.EmbedStreamResponse, raw)[0].WhichOneof("part") for raw, _ in messages]
    assert kinds.count("results") == 1 and kinds.count("frame") > 10


@pytest.mark.parametrize("counts", [[4] * 30, [60], [60, 3, 61]])
def test_messages_with_tokens_keep_below_the_frame_size_too(tokenizer: Vocabulary, counts: list[int]) -> None:
    answer = answers.make(counts, [answers.hidden_states([0, 1], 16)], "float32", return_tokens=True)
    ledger = sent_ledger(answer)
    ledger.feed(stream_header(answer), memoryview(b""))
    for raw, _ in messages_of(stream_results(answer), answer.plan, tokenizer, 4096):
        for part, payload in split_all([raw], pb.EmbedStreamResponse, 4096):
            ledger.feed(part, payload)
    found = ledger.ready()
    assert len(found) == len(counts)
    for result in found:
        answer.check_one(result.embedding, result.index)
        assert result.embedding.tokens.input_ids[0].tolist() == answer.texts[result.index].input_ids.tolist()


# What a user holds.

EVERYTHING = answers.make(
    [3, 1, 5],
    [
        answers.hidden_states([0, 2, 4], 6),
        answers.pooler_output(6),
        answers.pooled_vectors(1, 4),
        answers.pooled_vectors(4, 12),
    ],
    "float32",
)


@pytest.fixture(params=list(wire.DTYPES))
def embedding(request: pytest.FixtureRequest) -> Embedding:
    answer = answers.make(EVERYTHING.counts, EVERYTHING.plan.outputs, request.param)
    return assemble(answer, opened(answer, whole_frames(answer)))


def arrays(found: Embedding) -> Iterator[np.ndarray]:
    yield from found.pools
    yield found.pooler_output
    for layer in found.layers:
        yield found.hidden_states[layer]
        yield from found.ragged(layer)
    yield from (found.token_counts, found.truncated, found.attention_mask, found.last_hidden_state)


def test_arrays_are_contiguous_aligned_writable_and_not_the_frames(embedding: Embedding) -> None:
    for array in arrays(embedding):
        assert array.flags.c_contiguous and array.flags.aligned and array.flags.writeable
        array[...] = 0
    assert embedding.token_counts.dtype == np.int64
    assert embedding.truncated.dtype == np.bool_
    assert embedding.attention_mask.dtype == np.int64


def test_stream_results_are_contiguous_aligned_and_writable(tokenizer: Vocabulary) -> None:
    for most in (1 << 14, 400):
        ledger = sent_ledger(EVERYTHING)
        ledger.feed(stream_header(EVERYTHING), memoryview(b""))
        for raw, _ in messages_of(stream_results(EVERYTHING), EVERYTHING.plan, tokenizer, most):
            ledger.feed(*wire.split(pb.EmbedStreamResponse, raw))
        for result in ledger.ready():
            for array in arrays(result.embedding):
                assert array.flags.c_contiguous and array.flags.aligned and array.flags.writeable


def test_ragged_rows_are_views(embedding: Embedding) -> None:
    for layer in embedding.layers:
        for first, second in zip(embedding.ragged(layer), embedding.ragged(layer), strict=True):
            assert np.shares_memory(first, second)
    equal = answers.make([4, 4], [answers.hidden_states([1], 2)], "float32")
    found = assemble(equal, opened(equal, whole_frames(equal)))
    assert np.shares_memory(found.hidden_states[1], found.ragged(1)[1])


def test_pickling_gives_the_same_back(embedding: Embedding, tokenizer: Vocabulary) -> None:
    embedding.hidden_states[0]  # A padded array is there now; it is not to be pickled.
    again = pickle.loads(pickle.dumps(embedding))
    for found, wanted in zip(arrays(again), arrays(embedding), strict=True):
        answers.same(found, wanted)
        assert found.flags.writeable
    assert (again.layers, again.model, again.timings) == (embedding.layers, embedding.model, embedding.timings)
    result = pickle.loads(pickle.dumps(StreamResult(index=7, error=None, _embedding=embedding)))
    assert result.index == 7 and result.error is None
    answers.same(result.embedding.pools[0], embedding.pools[0])
    texts = [responses.tokens(Tokenized(text=Text(np.array([101, 102], np.int32))), tokenizer)]
    tokens = build_tokens(texts, 0)
    copy = pickle.loads(pickle.dumps(tokens))
    assert copy.tokens == tokens.tokens == [["101", "102"]]
    for name in ("input_ids", "attention_mask", "word_ids", "offset_mapping", "token_counts", "truncated"):
        answers.same(getattr(copy, name), getattr(tokens, name))


@pytest.mark.parametrize("kind", LayertapError.__subclasses__(), ids=lambda kind: kind.__name__)
def test_errors_pickle(kind: type[LayertapError]) -> None:
    error = pickle.loads(pickle.dumps(kind("what is wrong", retry_after_s=0.5)))
    assert type(error) is kind
    assert (error.code, error.details, str(error), error.retry_after_s) == (
        kind.code,
        "what is wrong",
        "what is wrong",
        0.5,
    )
    result = pickle.loads(pickle.dumps(StreamResult(index=3, error=error, _embedding=None)))
    with pytest.raises(kind, match="what is wrong"):
        _ = result.embedding


def test_hidden_states_are_indexed_by_layer_number(embedding: Embedding) -> None:
    states = embedding.hidden_states
    assert embedding.layers == states.layers == (0, 2, 4) and len(states) == 3
    for layer in (0, 2, 4):
        assert states[layer] is states[layer - 5]
        assert states[layer].shape == (3, 5, 6)
        assert states[np.int64(layer)] is states[layer]
    assert embedding.last_hidden_state is states[4] is states[-1]
    assert [state is states[layer] for state, layer in zip(states, (0, 2, 4), strict=True)] == [True] * 3
    assert states[4:][0] is states[-1:][0] is states[4]
    assert [state is states[layer] for state, layer in zip(states[::2], (0, 2, 4), strict=True)] == [True] * 3
    assert states[4::-2][1] is states[2]
    assert states[5:] == ()


@pytest.mark.parametrize("layer", [1, 3, -2, -4, 5, -6, 100])
def test_a_layer_that_is_not_held_is_an_index_error_with_a_hint(embedding: Embedding, layer: int) -> None:
    for get in (embedding.hidden_states.__getitem__, embedding.hidden_states.ragged, embedding.ragged):
        with pytest.raises(IndexError, match=rf"layer {layer} is not held \(held: 0, 2, 4\)"):
            get(layer)
    if -5 <= layer <= 4:
        with pytest.raises(IndexError, match="ask for it with layers="):
            embedding.ragged(layer)


def test_a_slice_with_a_layer_that_is_not_held_is_an_index_error(embedding: Embedding) -> None:
    with pytest.raises(IndexError, match="layer 1 is not held"):
        _ = embedding.hidden_states[:]


def test_attentions_are_sliced_by_layer_number_too() -> None:
    ragged = {layer: np.full((1, 2), layer, np.float32) for layer in (3, 4, 5)}
    attentions = Attentions(ragged=ragged, heads=(0, 1), token_counts=np.array([1]), layer_count=6)
    assert [float(layer[0, 0, 0, 0]) for layer in attentions[-3:]] == [3, 4, 5] and attentions[6:] == ()
    with pytest.raises(IndexError, match=r"layer 2 is not held .*attentions=\[2\]"):
        _ = attentions[2:4]


def test_to_tuple_is_what_transformers_would_give(embedding: Embedding) -> None:
    last, pooler_output, states = embedding.to_tuple()
    assert last is embedding.last_hidden_state and pooler_output is embedding.pooler_output
    assert [state is embedding.hidden_states[layer] for state, layer in zip(states, (0, 2, 4), strict=True)] == [
        True
    ] * 3
    only = answers.make([2], [answers.pooled_vectors(0, 3)], "float32")
    assert assemble(only, opened(only, whole_frames(only))).to_tuple() == ()
    below = answers.make([2], [answers.hidden_states([1], 3)], "float32")
    found = assemble(below, opened(below, whole_frames(below)))
    ((state,),) = found.to_tuple()
    assert state is found.hidden_states[1]


def test_what_was_not_asked_for_says_how_to_ask() -> None:
    bare = answers.make([2, 1], [answers.hidden_states([1], 3)], "float32")
    found = assemble(bare, opened(bare, whole_frames(bare)))
    with pytest.raises(LookupError, match="pooler_output=True"):
        _ = found.pooler_output
    with pytest.raises(LookupError, match="return_tokens=True"):
        _ = found.tokens
    with pytest.raises(LookupError, match="pooling="):
        _ = found.pooled
    with pytest.raises(IndexError, match="layer -1 is not held"):
        _ = found.last_hidden_state
    several = assemble(EVERYTHING, opened(EVERYTHING, whole_frames(EVERYTHING)))
    with pytest.raises(LookupError, match="2 poolings"):
        _ = several.pooled
    assert len(several) == 3 and "text_count=3" in repr(several)
