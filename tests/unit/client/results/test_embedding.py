"""What a user holds: arrays of his own, by layer number, that can be pickled; what is not there says how to ask."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import numpy as np
import pytest
from support import answers
from support.messages import (
    VOCABULARY,
    assemble,
    opened,
    sent_ledger,
    stream_header,
    stream_results,
    whole_frames,
)

from layertap import Embedding, LayertapError, StreamResult, wire
from layertap._protocol.result_builder import build_tokens
from layertap.results.attentions import Attentions
from layertap.v1 import embedding_pb2 as pb
from layertap_server.model.tokenized import Tokenized
from layertap_server.protocol import responses
from layertap_server.protocol.stream_responses import messages as messages_of
from layertap_server.types import Text

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


def test_stream_results_are_contiguous_aligned_and_writable() -> None:
    for most in (1 << 14, 400):
        ledger = sent_ledger(EVERYTHING)
        ledger.feed(stream_header(EVERYTHING), memoryview(b""))
        for raw, _ in messages_of(stream_results(EVERYTHING), EVERYTHING.plan, VOCABULARY, most):
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


def test_pickling_gives_the_same_back(embedding: Embedding) -> None:
    embedding.hidden_states[0]  # A padded array is there now; it is not to be pickled.
    again = pickle.loads(pickle.dumps(embedding))
    for found, wanted in zip(arrays(again), arrays(embedding), strict=True):
        answers.same(found, wanted)
        assert found.flags.writeable
    assert (again.layers, again.model, again.timings) == (embedding.layers, embedding.model, embedding.timings)
    result = pickle.loads(pickle.dumps(StreamResult(index=7, error=None, _embedding=embedding)))
    assert result.index == 7 and result.error is None
    answers.same(result.embedding.pools[0], embedding.pools[0])
    texts = [responses.tokens(Tokenized(text=Text(np.array([101, 102], np.int32))), VOCABULARY)]
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
