"""What a caller can pass wrongly: refused by its name or place and the next step, without the text, before any call."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.refusals import GOOD, SECRET

from layertap import InvalidArgumentError, LayerMix, Pooling, Spanned, TokenIds, Windows
from layertap._protocol import requests
from layertap._protocol.inputs import to_messages
from layertap._protocol.options import raises


def refused(message: str, call: Callable[..., object], *args: Any, **options: Any) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        call(*args, **options)
    found = caught.value.details
    assert re.search(message, found) and SECRET not in found and "\n" not in found and len(found) < 400, found


WRONG_ITEMS: dict[str, tuple[Any, str]] = {
    "none": (None, "is missing"),
    "an int": (5, "of type int; pass the ids of one text as one item"),
    "a float": (2.5, "of type float; pass"),
    "bytes": (SECRET.encode(), "of type bytes"),
    "a dict": ({SECRET: SECRET}, "of type dict without input_ids"),
    "spans that are no pairs": (Spanned(GOOD, [0, 1]), r"has spans of dtype int64 and shape \(2,\)"),
    "spans of no unit": (Spanned(GOOD, [(0, 1)], "words"), "unit is 'words'; pass one of"),  # type: ignore[arg-type]
    "spans of spans": (Spanned(Spanned(GOOD, []), []), "is a Spanned of a Spanned"),  # type: ignore[arg-type]
    "a span of 33 bits": (Spanned(GOOD, [(0, 2**31)]), "spans has a value beyond 32 bits"),
    "a set": ({SECRET}, "of type set"),
    "a tuple of three": ((SECRET, SECRET, SECRET), "of type tuple"),
    "a tuple of one": ((SECRET,), "of type tuple"),
    "no tuple": ((), "of type tuple"),
    "a tuple with an int": ((SECRET, 1), "of type tuple"),
    "a tuple with none": ((SECRET, None), "of type tuple"),
    "a list with an int": ([SECRET, 1], "words whose entry 1 is of type int"),
    "an int before a word": ([1, SECRET], "words whose entry 0 is of type int"),
    "a list with none": ([SECRET, None], "words whose entry 1 is missing"),
    "a list of bytes": ([SECRET.encode()], "has input_ids of dtype"),
    "an empty list": ([], "has no input_ids"),
    "an empty array": (np.zeros(0, np.int64), "has no input_ids"),
    "floats": ([101.0, 102.5], "has input_ids of dtype float64"),
    "an array of floats": (np.array([101.0, 102.0]), "has input_ids of dtype float64"),
    "an array of objects": (np.array([101, SECRET, None], object), "words whose entry 0"),
    "an array of one number": (np.array(101), "of type ndarray; pass the ids of one text as one item"),
    "an array of two dimensions": (np.array([[101, 102]]), r"shape \(1, 2\)"),
    "a list of lists": ([[101, 102], [101, 102]], r"shape \(2, 2\)"),
    "a ragged list of lists": ([[101, 102], [101]], "is not rectangular"),
    "a list of pairs": ([(SECRET, SECRET)], "has input_ids of dtype"),
    "an id of 33 bits": ([101, 2**31], "input_ids has a value beyond 32 bits"),
    "an id of 80 bits": ([101, 2**80], "input_ids of dtype object"),
    "a very negative id": ([101, -(2**31) - 1], "input_ids has a value beyond 32 bits"),
    "nan": ([float("nan")], "has input_ids of dtype float64"),
    "a lone surrogate": (SECRET + "\ud800", "has a lone surrogate"),
    "a lone surrogate in a pair": ((SECRET, "\udfff"), "has a lone surrogate"),
    "a lone surrogate among words": ([SECRET, "\ud800"], "has a lone surrogate"),
    "ragged token ids": (TokenIds([[101, 102], [101]]), "is not rectangular"),
    "token ids that are a word": (TokenIds(SECRET), "has input_ids of dtype"),
    "token ids of floats": (TokenIds([101.5]), "has input_ids of dtype float64"),
    "a batch of token ids": (TokenIds([[101, 102]]), r"shape \(1, 2\)"),
    "a mask of floats": (TokenIds([101, 102], [0.5, 1.0]), "attention_mask of dtype float64 .*; pass ints"),
    "a mask of words": (TokenIds([101, 102], [SECRET, SECRET]), "has attention_mask of dtype"),
    "a mask of two dimensions": (TokenIds([101, 102], [[1, 1]]), "has attention_mask of dtype"),
    "a mask that is shorter": (TokenIds([101, 102], [1]), "attention_mask has 1 entries, input_ids 2; make them equal"),
    "a mask that is longer": (TokenIds([101], [1, 1]), "attention_mask has 2 entries, input_ids 1"),
    "an empty mask": (TokenIds([101, 102], []), "attention_mask has 0 entries, input_ids 2"),
    "token types of floats": (TokenIds([101, 102], None, [0.0, 0.0]), "has token_type_ids of dtype float64"),
    "fewer token types": (TokenIds([101, 102], None, [0]), "token_type_ids has 1 entries, input_ids 2"),
    "no token types": (TokenIds([101, 102], None, np.zeros(0, int)), "token_type_ids has 0 entries, input_ids 2"),
}


@pytest.mark.parametrize("case", WRONG_ITEMS)
def test_an_item_that_is_no_text_is_named_by_its_place(case: str) -> None:
    item, message = WRONG_ITEMS[case]
    refused(rf"^inputs\[2\].*{message}", to_messages, [GOOD, GOOD, item, GOOD])


WRONG_INPUTS: dict[str, tuple[Any, str]] = {
    "an empty list": ([], "inputs is empty; pass at least one text"),
    "an empty tuple": ((), "inputs is empty"),
    "an empty iterator": (iter(()), "inputs is empty"),
    "an array without rows": (np.zeros((0, 4), np.int64), "inputs is empty"),
    "token ids without rows": (TokenIds(np.zeros((0, 4), np.int64)), "inputs is empty"),
    "token ids without columns": (TokenIds(np.zeros((2, 0), np.int64)), r"inputs\[0\] has no input_ids"),
    "no token ids": (TokenIds([]), r"inputs\[0\] has no input_ids"),
    "none": (None, "inputs is of type NoneType; pass"),
    "a float": (3.5, "inputs is of type float; pass"),
    "a bool": (True, "inputs is of type bool; pass"),
    "bytes": (SECRET.encode(), "inputs is of type bytes; pass"),
    "a dict": ({SECRET: 1}, "inputs is of type dict without input_ids; pass"),
    "an object": (object(), "inputs is of type object; pass"),
    "a ragged mask": (TokenIds([[101, 102], [101, 102]], [[1, 1], [1]]), r"inputs\[1\].attention_mask has 1"),
    "a mask of another shape": (TokenIds([[101, 102], [101, 102]], [[1, 1]]), "attention_mask has 1 row, .* 2 rows"),
    "types of another shape": (TokenIds([[101, 102], [101, 102]], None, [0, 0]), "token_type_ids has 1 row, .* 2"),
    "three dimensions": (TokenIds(np.ones((2, 2, 2), np.int64)), r"input_ids of dtype int64 and shape \(2, 2\)"),
    "no dimension": (TokenIds(101), r"input_ids of dtype int64 and shape \(\)"),
    "a word": (TokenIds(SECRET), "input_ids of dtype"),
    "floats": (TokenIds([[101.0, 102.0]]), "input_ids of dtype float64"),
}


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_what_is_no_batch_of_texts_is_refused_by_its_type(case: str) -> None:
    refused(WRONG_INPUTS[case][1], to_messages, WRONG_INPUTS[case][0])


WEIGHTED = LayerMix("weighted", layers=[1], weights=[1.0])
WRONG_OPTIONS: list[tuple[dict[str, Any], str]] = [
    *(({"layers": one}, "^layers ") for one in ("most", "", True, 1.5, [1.5], ["1"], [None], [], [2**31], [[1]])),
    *(({"dtype": one}, "^dtype is .*bfloat16") for one in ("float64", "FLOAT32", "", None, 32)),
    *(({"truncation": one}, "^truncation is .*left") for one in ("middle", "", None, True)),
    *(({"pooling": one}, "^pooling.strategy is .*mean_max") for one in ("median", "", "MEAN", ["cls", Pooling("MAX")])),
    *(({"pooling": one}, "^pooling is of type") for one in (5, [5], [None], [["mean"]], {"mean": 1}.items())),
    *(({"words": one}, "^words is .*first_last") for one in ("middle", "", "MEAN", True, 1, ["mean"])),
    *(({"max_length": n}, "^max_length ") for n in (0, -1, 2**40, 2.5, "7", [7])),
    *(({"pooling": Pooling("mean", dimensions=n)}, "^pooling.dimensions ") for n in (0, -1, 2**31, 2.5, "8")),
    ({"attentions": "all", "attention_heads": []}, "^attention_heads is empty"),
    ({"attentions": []}, "^attentions is empty"),
    ({"attentions": "last"}, '^attentions is .*pass "all"'),
    ({"attention_heads": [0]}, '^attention_heads belongs to attentions; pass attentions="all"'),
    ({"windows": 5}, r"^windows is of type int; pass Windows\(stride=…\)"),
    ({"windows": Windows(stride=1.5)}, "^windows.stride has a value of type float"),
    ({"span_pooling": Pooling("mean", include_special_tokens=False)}, "^span_pooling excludes special tokens"),
    ({"prompt": 5}, "^prompt is of type int; pass a str"),
    ({"prompt": SECRET + "\ud800"}, "^prompt has a lone surrogate"),
    *(({"mix": one}, "^mix is of type .*; pass a LayerMix") for one in ("mean", [-1, -2])),
    *(
        ({"mix": mix}, message)
        for mix, message in (
            (LayerMix("median", layers=[1]), "^mix.strategy is 'median'; pass one of .*concat"),
            (LayerMix("mean", layers=[]), "^mix.layers is empty; name at least one"),
            (LayerMix("mean", layers="most"), '^mix.layers is .*"all"'),
            (LayerMix("weighted", layers=[1], weights=[SECRET]), "^mix.weights has something else than numbers"),
            (LayerMix("weighted", layers=[1], weights=[[1.0], []]), "^mix.weights is not flat"),
            (LayerMix("weighted", layers=[1], weights=[[1.0]]), "^mix.weights has something else than numbers"),
            (LayerMix("weighted", layers=[1], weights=2.0), "^mix.weights has something else than numbers"),
        )
    ),
    ({"pooling": ["mean", Pooling("mean", layer=LayerMix("mean", layers=[]))]}, "^pooling.layer.layers is empty"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_OPTIONS, ids=[str(one[0]) for one in WRONG_OPTIONS])
def test_an_option_that_is_none_is_refused_by_its_name_and_what_it_may_be(
    options: dict[str, Any], message: str
) -> None:
    refused(message, requests.embed, GOOD, dict(options))
    refused(message, requests.embed_stream, dict(options))


def test_other_arguments() -> None:
    refused('^on_error is .*"raise"', raises, "ignore")
    for ids in ([], "", SECRET, None, [None], [SECRET], [1.5], [2**31], [[1], [None]], [[[1]]], 5.5):
        refused("^ids ", requests.decode, ids, skip_special_tokens=False)
