"""Inputs as messages: mappings are token ids, arrays of str are words, and what is neither is refused by its place."""

from __future__ import annotations

from collections import UserDict
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from layertap import InvalidArgumentError, LayerMix, Pooling, TokenIds
from layertap._protocol import requests
from layertap._protocol.inputs import check_items, to_message, to_messages
from layertap._protocol.options import embed_options
from layertap.v1 import embedding_pb2 as pb

IDS = [[101, 7592, 102], [101, 102, 0]]
MASK = [[1, 1, 1], [1, 1, 0]]


class Tensor:
    """What a tensor of another library has."""

    def __init__(self, values: Any) -> None:
        self._array = np.asarray(values)
        self.shape, self.ndim, self.dtype = self._array.shape, self._array.ndim, "an int64 of its own"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._array, dtype)

    def __len__(self) -> int:
        return len(self._array)

    def __iter__(self) -> Any:
        return (Tensor(row) for row in self._array)


def ids(*rows: list[int], masks: Any = None, types: Any = None) -> list[pb.Input]:
    masks, types = masks or [[]] * len(rows), types or [[]] * len(rows)
    return [
        pb.Input(token_ids=pb.TokenIds(input_ids=row, attention_mask=mask, token_type_ids=type_))
        for row, mask, type_ in zip(rows, masks, types, strict=True)
    ]


@pytest.mark.parametrize("kind", [dict, UserDict, MappingProxyType])
@pytest.mark.parametrize("values", [list, np.array, Tensor])
def test_a_mapping_of_ids_and_masks_is_a_batch_of_token_ids(kind: Any, values: Any) -> None:
    given = {"input_ids": values(IDS), "attention_mask": values(MASK), "token_type_ids": values(np.zeros((2, 3), int))}
    assert to_messages(kind(given)) == ids(*IDS, masks=MASK, types=[[0] * 3] * 2)
    assert to_messages(kind({"input_ids": values(IDS), "length": [3, 2]})) == ids(*IDS)


def test_rows_may_be_of_different_lengths() -> None:
    given = {"input_ids": [[101, 102], [101, 7592, 102]], "attention_mask": [[1, 1], [1, 1, 0]]}
    wanted = ids([101, 102], [101, 7592, 102], masks=[[1, 1], [1, 1, 0]])
    assert to_messages(given) == wanted
    assert to_messages(TokenIds(**given)) == wanted


@pytest.mark.parametrize("values", [np.array, Tensor, tuple])
def test_token_ids_of_one_row_are_one_text_and_arrays_in_an_array_are_several(values: Any) -> None:
    assert to_messages(TokenIds(values([101, 102]))) == ids([101, 102])
    cells = np.empty(2, object)
    cells[:] = [np.array([101, 102]), np.array([101, 7592, 102])]
    assert to_messages(TokenIds(cells)) == ids([101, 102], [101, 7592, 102])


def test_a_mapping_of_one_row_is_one_text_and_may_be_an_item() -> None:
    one = {"input_ids": [101, 102], "attention_mask": [1, 0]}
    assert to_messages(one) == ids([101, 102], masks=[[1, 0]])
    assert to_messages([one, "text"]) == [*ids([101, 102], masks=[[1, 0]]), pb.Input(text="text")]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"text": ["a"]}, "dict without input_ids"),
        (UserDict(a=1), "UserDict without input_ids"),
        ({}, "dict without input_ids"),
        ({"input_ids": IDS, "position_ids": IDS}, "with position_ids, which layertap does not compute"),
        ({"input_ids": IDS, "attention_mask": MASK[:1]}, "attention_mask has 1 row, input_ids 2 rows"),
        ({"input_ids": IDS, "attention_mask": MASK[0]}, "attention_mask has 1 row, input_ids 2 rows"),
        ({"input_ids": [[101, 102], [101]], "attention_mask": [[1, 1], [1, 1]]}, r"inputs\[1\].attention_mask has 2"),
        ({"input_ids": [[101, 102], [1.5, 2.5]]}, r"inputs\[1\] has input_ids of dtype float64"),
        ({"input_ids": [[True, False]]}, r"inputs\[0\] has input_ids of dtype bool"),
        (["a", {"text": "b"}], r"inputs\[1\] is of type dict without input_ids"),
    ],
    ids=str,
)
def test_other_mappings_are_refused_by_name(given: Any, named: str) -> None:
    with pytest.raises(InvalidArgumentError, match=named):
        to_messages(given)


def test_a_batch_is_not_read_as_a_stream_of_its_keys() -> None:
    for batch in (UserDict(input_ids=IDS), TokenIds(IDS)):
        with pytest.raises(InvalidArgumentError, match="pass an iterable of texts, or the whole batch to embed"):
            check_items(batch)


@pytest.mark.parametrize("words", [np.array(["two", "words"]), np.array(["two", "words"], object)])
def test_an_array_of_str_is_words(words: np.ndarray) -> None:
    wanted = pb.Input(words=pb.Words(words=["two", "words"]))
    assert to_message(words, 0) == wanted
    cells = np.empty(2, object)
    cells[:] = [words, words]
    assert to_messages(cells) == [wanted, wanted]


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_word_that_is_missing_is_named_by_its_place(missing: Any) -> None:
    for words in (["a", missing], np.array(["a", missing], object)):
        with pytest.raises(InvalidArgumentError, match=r"inputs\[1\] is a list of words whose entry 1 is missing"):
            to_messages(["text", words])
    with pytest.raises(InvalidArgumentError, match="entry 0 is of type int"):
        to_message([5, "a"], 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("ids", [[101, 102], np.array([101, 102])])
def test_the_ids_of_one_text_are_one_item(ids: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"inputs\[0\] is of type int.*; pass the ids of one text as one"):
        to_messages(ids)


@pytest.mark.parametrize("scalar", [np.array("text"), np.array(5), Tensor(5)])
def test_an_array_without_dimensions_is_refused_by_name(scalar: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"inputs is of type .* has no dimensions"):
        to_messages(scalar)
    with pytest.raises(InvalidArgumentError, match=r"inputs\[0\] is of type"):
        to_messages([scalar])


@pytest.mark.parametrize("one", [-1, np.int64(-1), np.array(-1)])
def test_one_layer_number_is_as_good_as_a_list_of_it(one: Any) -> None:
    assert embed_options(layers=one) == embed_options(layers=[-1])
    assert embed_options(mix=LayerMix("sum", layers=one)) == embed_options(mix=LayerMix("sum", layers=[-1]))


@pytest.mark.parametrize("one", [True, 1.0, None.__class__])
def test_what_is_no_layer_number_is_refused(one: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="layers has a value of type"):
        embed_options(layers=one)


@pytest.mark.parametrize(
    ("good", "wrong"),
    [
        ({"layers": 1}, {"layers": True}),
        ({"layers": 1}, {"layers": 1.0}),
        ({"max_length": 8}, {"max_length": 8.0}),
        ({"layers": (0, 1)}, {"layers": (False, True)}),
        ({"pooling": Pooling("mean", layer=1)}, {"pooling": Pooling("mean", layer=True)}),
    ],
)
def test_options_that_equal_those_of_an_earlier_request_are_refused_all_the_same(good: Any, wrong: Any) -> None:
    assert requests.embed("a", dict(good)).options == requests.embed("b", dict(good)).options
    with pytest.raises(InvalidArgumentError):
        requests.embed("a", wrong)


def test_an_option_of_another_method_is_refused_after_the_method_that_has_it() -> None:
    given: Any = {"return_tokens": True}
    requests.embed("a", dict(given))
    with pytest.raises(TypeError, match="unexpected keyword argument 'return_tokens'"):
        requests.embed_layers("a", given)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("padding", "pad_to=…"),
        ("return_tensors", r"to_torch\(\)"),
        ("output_hidden_states", 'layers="all"'),
        ("return_offsets_mapping", "return_tokens=True"),
        ("is_split_into_words", "list of its words"),
        ("timeout_s", "item_timeout_s="),
        ("layerz", "the options are .*layers"),
    ],
)
def test_an_option_of_transformers_is_refused_with_what_to_pass_instead(name: str, instead: str) -> None:
    given: Any = {name: True}
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'; .*{instead}"):
        requests.embed("a", given)
