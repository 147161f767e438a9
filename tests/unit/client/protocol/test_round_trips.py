"""What the server cuts and packs, the client puts together: all three kinds of answers, there and back."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import answers
from support.answers import Answer
from support.messages import (
    VOCABULARY,
    assemble,
    check_layers,
    gather,
    opened,
    sent_ledger,
    stream_header,
    stream_results,
)

import layertap
from layertap import DataLossError, wire
from layertap._protocol.responses import ModelPin, read_embedding
from layertap.v1 import embedding_pb2 as pb
from layertap_server.observability.call_log import Record
from layertap_server.protocol import responses
from layertap_server.protocol.frames import frames_of
from layertap_server.protocol.stream_responses import Result
from layertap_server.protocol.stream_responses import messages as messages_of
from layertap_server.types import Unit

MODEST = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


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


@MODEST
@given(data=st.data(), answer=answers.answers(max_count=40, max_texts=6), most=st.integers(400, 2000))
def test_what_the_server_packs_or_spreads_the_ledger_unpacks(data: st.DataObject, answer: Answer, most: int) -> None:
    most += 1024 * answer.plan.has_words  # A list of words is not cut.
    results = stream_results(answer)
    bad = data.draw(st.sets(st.integers(0, len(results) - 1)), label="failed texts")
    for n in bad:
        results[n] = Result(id=n, error=layertap.OutOfRangeError(f"item {n}: too large"))
    ledger = sent_ledger(answer)
    ledger.feed(stream_header(answer), memoryview(b""))
    answered = []
    completed = []
    for raw, done in messages_of(results, answer.plan, VOCABULARY, most):
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


def test_small_results_share_a_message_and_large_ones_are_spread() -> None:
    small = answers.make([3] * 50, [answers.pooled_vectors(2, 4)], "float32")
    assert len(list(messages_of(stream_results(small), small.plan, VOCABULARY, 1 << 14))) == 1
    many = stream_results(answers.make([1] * 1200, [answers.pooled_vectors(2, 4)], "float32"))
    assert [len(done) for _, done in messages_of(many, small.plan, VOCABULARY, 1 << 20)] == [512, 512, 176]
    large = answers.make([40, 2, 40], [answers.hidden_states([0, 1, 4], 32)], "float32")
    messages = list(messages_of(stream_results(large), large.plan, VOCABULARY, 2000))
    kinds = [wire.split(pb.EmbedStreamResponse, raw)[0].WhichOneof("part") for raw, _ in messages]
    assert kinds.count("results") == 1 and kinds.count("frame") > 10


@pytest.mark.parametrize("counts", [[4] * 30, [60], [60, 3, 61]])
def test_messages_with_tokens_keep_below_the_frame_size_too(counts: list[int]) -> None:
    answer = answers.make(counts, [answers.hidden_states([0, 1], 16)], "float32", return_tokens=True)
    ledger = sent_ledger(answer)
    ledger.feed(stream_header(answer), memoryview(b""))
    for raw, _ in messages_of(stream_results(answer), answer.plan, VOCABULARY, 4096):
        for part, payload in split_all([raw], pb.EmbedStreamResponse, 4096):
            ledger.feed(part, payload)
    found = ledger.ready()
    assert len(found) == len(counts)
    for result in found:
        answer.check_one(result.embedding, result.index)
        assert result.embedding.tokens.input_ids[0].tolist() == answer.texts[result.index].input_ids.tolist()
