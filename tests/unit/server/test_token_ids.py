"""Token ids of a group, read at once, are what each text says by itself; a fault harms no other."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import answers

from layertap.errors import InvalidArgumentError
from layertap.v1 import embedding_pb2 as pb
from layertap_server.protocol import token_ids
from layertap_server.types import Text

MODEL = dataclasses.replace(answers.IDENTITY, vocab_size=100, max_length=4)

GOOD = [
    pb.TokenIds(input_ids=[1]),
    pb.TokenIds(input_ids=[1, 99, 0, 2], attention_mask=[1, 1, 1, 1], token_type_ids=[0, 0, 0, 0]),
    pb.TokenIds(input_ids=[5, 6], attention_mask=[0, 1]),
    pb.TokenIds(input_ids=[7, 8, 9], token_type_ids=[0, 1, 1]),
    pb.TokenIds(input_ids=[3, 3], attention_mask=[0, 0]),
]
BAD = {
    "no ids": (pb.TokenIds(), "no input_ids"),
    "too many": (pb.TokenIds(input_ids=[1] * 5), "the most is 4"),
    "an id above": (pb.TokenIds(input_ids=[1, 100]), r"input_ids\[1\] is outside"),
    "a negative id": (pb.TokenIds(input_ids=[-1]), r"input_ids\[0\] is outside"),
    "a short mask": (pb.TokenIds(input_ids=[1, 2], attention_mask=[1]), "attention_mask has 1 entries"),
    "a mask of 2": (pb.TokenIds(input_ids=[1], attention_mask=[2]), "from 0 to 1"),
    "a long list of types": (pb.TokenIds(input_ids=[1], token_type_ids=[0, 0]), "token_type_ids has 2 entries"),
    "a type above": (pb.TokenIds(input_ids=[1], token_type_ids=[2]), "from 0 to 1"),
}


def check(message: pb.TokenIds, text: object) -> None:
    assert isinstance(text, Text)
    assert text.input_ids.tolist() == list(message.input_ids) and text.input_ids.dtype == np.int32
    for sent, found, rest in (
        (message.attention_mask, text.attention_mask, 1),
        (message.token_type_ids, text.token_type_ids, 0),
    ):
        assert (found is None) == all(value == rest for value in sent)
        assert found is None or found.tolist() == list(sent)


@given(st.lists(st.sampled_from(GOOD), min_size=1, max_size=6))
def test_a_group_is_what_its_texts_are(messages: list[pb.TokenIds]) -> None:
    found = token_ids.texts(messages, [str(n) for n in range(len(messages))], MODEL)
    for message, text in zip(messages, found, strict=True):
        check(message, text)


@pytest.mark.parametrize(("bad", "why"), BAD.values(), ids=BAD.keys())
def test_a_fault_is_named_and_harms_no_other(bad: pb.TokenIds, why: str) -> None:
    messages = [*GOOD, bad, *GOOD]
    found = token_ids.texts(messages, [f"item {n}" for n in range(len(messages))], MODEL)
    error = found.pop(len(GOOD))
    assert isinstance(error, InvalidArgumentError) and error.details.startswith(f"item {len(GOOD)}")
    with pytest.raises(InvalidArgumentError, match=why):
        raise error
    for message, text in zip([*GOOD, *GOOD], found, strict=True):
        check(message, text)


def test_a_group_without_masks_is_one_array() -> None:
    first, second = token_ids.texts([GOOD[0], GOOD[1]], ["0", "1"], MODEL)
    assert isinstance(first, Text) and isinstance(second, Text)
    assert first.input_ids.base is second.input_ids.base
