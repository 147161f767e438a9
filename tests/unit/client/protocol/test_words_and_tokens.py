"""Words and tokens beside the rows of an answer: in groups below the frame size, each once, all that were promised."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from support import answers
from support.answers import Answer, Message
from support.messages import (
    VOCABULARY,
    assemble,
    opened,
    sent_ledger,
    stream_header,
    stream_results,
    whole_frames,
)

from layertap import DataLossError, wire
from layertap._protocol.assembler import EmbedAssembler
from layertap.v1 import embedding_pb2 as pb
from layertap_server.protocol import responses
from layertap_server.protocol.stream_responses import messages as messages_of

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


def test_words_of_a_stream_that_do_not_fit_are_a_data_loss() -> None:
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
            for raw, _ in messages_of(stream_results(WORDED), WORDED.plan, VOCABULARY, most):
                part, payload = wire.split(pb.EmbedStreamResponse, raw)
                holder = part.results if part.WhichOneof("part") == "results" else part.frame
                if spoil is None:
                    holder.ClearField("words")
                elif part.WhichOneof("part") == "results":
                    list(map(spoil, holder.words))
                elif holder.done:
                    spoil(holder.words)
                ledger.feed(part, payload)


def tokens_of(answer: Answer, max_frame_bytes: int = 1 << 14) -> list[Message]:
    groups = responses.token_groups(answer.tokenized, VOCABULARY, max_frame_bytes)
    return [(group, b"") for group in groups]


def test_tokens_come_in_groups_below_the_frame_size() -> None:
    answer = answers.make([5, 9, 1, 30, 2] * 4, [answers.hidden_states([1], 1)], "float32", return_tokens=True)
    groups = tokens_of(answer, 2000)
    assert len(groups) > 2 and all(group.ByteSize() <= 2000 for group, _ in groups)
    header, *rest = opened(answer, whole_frames(answer))
    found = assemble(answer, [header, *groups, *rest])
    answer.check(found)
    assert found.tokens.token_counts.tolist() == answer.counts
    for row, text in zip(found.tokens.input_ids, answer.texts, strict=True):
        assert row[: text.token_count].tolist() == text.input_ids.tolist()
        assert not row[text.token_count :].any()


def test_tokens_that_are_missing_or_come_twice_are_a_data_loss() -> None:
    answer = answers.make([5, 9, 3], [answers.hidden_states([1], 1)], "float32", return_tokens=True)
    groups = tokens_of(answer, 500)
    assert len(groups) >= 2
    header, *rest = opened(answer, whole_frames(answer))
    for wrong in ([], groups[:-1], groups[1:], [*groups, groups[-1]], groups[::-1]):
        with pytest.raises(DataLossError):
            assemble(answer, [header, *wrong, *rest])


def test_tokens_of_other_lengths_than_the_header_says_are_a_data_loss() -> None:
    answer = answers.make([5, 9], [answers.hidden_states([1], 1)], "float32", return_tokens=True)
    ((group, _),) = tokens_of(answer)
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
