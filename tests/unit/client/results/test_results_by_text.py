"""Results, text by text: what one text has is what it would have alone; tuples are those of transformers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from support.results import COUNTS, FULL, SIZE, embedding, tokens

from layertap import HiddenStates, LayerRows, MixedRows, Words
from layertap._protocol.result_builder import _strings
from layertap.v1 import embedding_pb2 as pb


@pytest.mark.parametrize(
    ("asked", "shapes"),
    [
        ({"layers": (6,), "pooler": True}, [(2, 5, SIZE), (2, SIZE)]),
        ({"layers": (6,)}, [(2, 5, SIZE)]),
        ({"layers": (0, 6), "pooler": True}, [(2, 5, SIZE), (2, SIZE), 2]),
        ({"layers": (0, 5)}, [2]),
        ({"pooler": True, "pools": 1}, [(2, SIZE)]),
    ],
)
def test_a_tuple_has_hidden_states_only_if_more_than_the_last_were_asked_for(asked: Any, shapes: list[Any]) -> None:
    found = embedding(**asked).to_tuple()
    assert [len(part) if isinstance(part, tuple) else part.shape for part in found] == shapes


def test_an_embedding_iterates_by_text() -> None:
    whole = embedding(**FULL, _tokens=tokens())
    assert [len(one) for one in whole] == [1, 1] and len(whole) == 2
    for n, one in enumerate(whole):
        count = COUNTS[n]
        assert one.layers == whole.layers and one.model is whole.model
        assert one.last_hidden_state.shape == (1, count, SIZE) and one.attention_mask.shape == (1, count)
        assert np.array_equal(one.last_hidden_state[0], whole.ragged(-1)[n])
        assert np.shares_memory(one.ragged(0)[0], whole.ragged(0)[n])
        assert np.array_equal(one.pools[1][0], whole.pools[1][n])
        assert np.array_equal(one.pooler_output[0], whole.pooler_output[n])
        assert one.tokens.tokens == [whole.tokens.tokens[n]] and one.tokens.input_ids.shape == (1, count)


def test_tokens_iterate_by_text_and_keep_the_name_of_their_call() -> None:
    whole = dataclasses.replace(tokens(), request_id="a-call")
    for n, one in enumerate(whole):
        assert one.request_id == "a-call" and one.tokens == [whole.tokens[n]] and one.token_counts == [COUNTS[n]]
        assert one.offset_mapping.shape == (1, COUNTS[n], 2) and one.truncated.tolist() == [n == 1]
        assert np.array_equal(one.word_ids[0], whole.word_ids[n, : COUNTS[n]])


def test_words_and_mixes_iterate_by_text() -> None:
    states = embedding(layers=(2,)).hidden_states
    mixed = MixedRows(layers=(1, 2), _states=HiddenStates(ragged=states._ragged, token_counts=COUNTS, layer_count=6))
    words = Words(
        word_counts=COUNTS,
        piece_counts=tuple(np.ones(count, np.int64) for count in COUNTS),
        offsets=tuple(np.zeros((count, 2), np.int64) for count in COUNTS),
        sequence_ids=tuple(np.zeros(count, np.int64) for count in COUNTS),
        _states=states,
        _mixed=mixed,
        strings=(tuple("abcde"), tuple("fgh")),
    )
    assert [one.word_counts.tolist() for one in words] == [[5], [3]]
    for n, one in enumerate(words):
        assert np.array_equal(one.ragged(2)[0], words.ragged(2)[n]) and one.strings == (words.strings[n],)
        assert np.array_equal(one.mixed.padded[0], words.mixed.ragged()[n]) and len(one.mixed) == 1


def test_words_are_strings_of_their_text() -> None:
    messages = [
        pb.Input(text="Zürich, 😀!"),
        pb.Input(pair=pb.TextPair(first="one", second="two three")),
        pb.Input(words=pb.Words(words=["given", "cut"])),
        pb.Input(text=""),
    ]
    texts = [
        pb.SplitText(piece_counts=[1, 1, 1], offsets=[0, 3, 3, 9, 9, 10], first_word_count=3),
        pb.SplitText(piece_counts=[1, 1, 1], offsets=[3, 6, 0, 3, 4, 9], first_word_count=1),
        pb.SplitText(piece_counts=[1, 0], offsets=[0, 5, 0, 0], first_word_count=2),
        pb.SplitText(),
    ]
    found = _strings(texts, messages, "q: ")
    assert found == (("q: ", "Zürich", ","), ("one", "two", "three"), ("given", "cut"), ())


def test_layer_rows_iterate_by_text() -> None:
    rows = embedding(layers=(2,)).ragged(2)
    one, other = LayerRows(layer=2, texts=range(7, 9), rows=rows)
    assert (one.layer, one.texts, other.texts) == (2, range(7, 8), range(8, 9))
    assert one.rows[0] is rows[0] and other.rows[0] is rows[1] and len(other) == 1
