"""What the tokenizer made of a text, checked against the model before the queue."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from support.answers import IDENTITY

from layertap.errors import InvalidArgumentError
from layertap_server.protocol import validation
from layertap_server.types import Text

MODEL = dataclasses.replace(IDENTITY, vocab_size=100, max_length=4)


def text(ids: list[int], types: list[int] | None = None) -> Text:
    return Text(np.array(ids, np.int32), token_type_ids=None if types is None else np.array(types, np.int32))


def test_a_text_within_the_model_fits() -> None:
    validation.check_fits(text([1, 99, 2], [0, 0, 1]), "inputs[0]", MODEL)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (text([]), r"inputs\[3\] has no tokens"),
        (text([1, 5, 5, 5, 2]), r"inputs\[3\] has 5 tokens, this model has 4 positions"),
        (text([1, 100, 2]), r"inputs\[3\] has token id 100, this model's vocabulary ends at 99"),
        (text([1, 5, 2], [0, 1, 2]), r"inputs\[3\] has token type 2, this model has 2"),
    ],
    ids=["no tokens", "too many tokens", "id above the vocabulary", "type above the model's"],
)
def test_what_a_tokenizer_makes_is_refused_before_the_queue(wrong: Text, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        validation.check_fits(wrong, "inputs[3]", MODEL)
