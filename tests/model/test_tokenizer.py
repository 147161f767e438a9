"""Tokens equal transformers' own: ids, pieces, masks, offsets and words, for every kind of text and every cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from support import BOUND, worst
from support.texts import EVERYTHING, PAIRS, PROPERTY, TEXTS, WORDS

from layertap import TokenIds, Tokens


@pytest.fixture(scope="module")
def right(real_folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(str(real_folder))


@pytest.fixture(scope="module")
def left(real_folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(str(real_folder), truncation_side="left")


def _encode(tokenizer: Any, item: Any, **options: Any) -> dict[str, Any]:
    """Tokenizes one item with transformers, as a batch of one: alone it would drop the empty second of a pair."""
    texts = [[part] for part in item] if isinstance(item, tuple) else [[item]]
    options |= {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    batch = tokenizer(*texts, is_split_into_words=isinstance(item, list), **options)
    word_ids = [-1 if word is None else word for word in batch.word_ids(0)]
    return {name: values[0] for name, values in batch.items()} | {"tokens": batch.tokens(0), "word_ids": word_ids}


def _check(tokens: Tokens, wanted: list[dict[str, Any]]) -> None:
    counts = [len(one["input_ids"]) for one in wanted]
    assert tokens.token_counts.tolist() == counts
    assert tokens.input_ids.shape == (len(wanted), max(counts))
    for n, (count, one) in enumerate(zip(counts, wanted, strict=True)):
        assert tokens.tokens[n] == one["tokens"], n
        for name in ("input_ids", "attention_mask", "token_type_ids", "special_tokens_mask"):
            found = getattr(tokens, name)
            assert found.dtype == np.int64
            assert found[n, :count].tolist() == one[name], (n, name)
        assert tokens.offset_mapping[n, :count].tolist() == [list(pair) for pair in one["offset_mapping"]], n
        assert tokens.word_ids[n, :count].tolist() == one["word_ids"], n
        # What lies past the tokens makes the arrays rectangular, and says so.
        assert not tokens.attention_mask[n, count:].any() and not tokens.input_ids[n, count:].any()
        assert tokens.special_tokens_mask[n, count:].all() and (tokens.word_ids[n, count:] == -1).all()
        assert not tokens.offset_mapping[n, count:].any() and not tokens.token_type_ids[n, count:].any()


@pytest.mark.parametrize("special", [True, False], ids=["with specials", "without specials"])
@pytest.mark.parametrize("item", EVERYTHING, ids=[*TEXTS, *map(str, range(len(PAIRS) + len(WORDS)))])
def test_every_kind_of_text(tiny: Any, right: Any, item: Any, special: bool) -> None:
    found = tiny.tokenize([item], add_special_tokens=special, max_length=100_000)
    _check(found, [_encode(right, item, add_special_tokens=special)])
    assert found.truncated.tolist() == [False]


def test_all_kinds_in_one_request(tiny: Any, right: Any) -> None:
    found = tiny.tokenize(EVERYTHING, max_length=100_000)
    _check(found, [_encode(right, item) for item in EVERYTHING])


def test_a_str_is_one_text(tiny: Any, right: Any) -> None:
    _check(tiny.tokenize("I love Paris"), [_encode(right, "I love Paris")])


def test_the_empty_text_is_a_text(tiny: Any) -> None:
    assert tiny.tokenize("").tokens == [["[CLS]", "[SEP]"]]
    bare = tiny.tokenize(["", "a"], add_special_tokens=False)
    assert bare.tokens == [[], ["a"]] and bare.token_counts.tolist() == [0, 1]


def test_more_texts_than_one_request_carries(tiny: Any, right: Any) -> None:
    texts = [f"text {n} " * (n % 7) for n in range(1500)]
    found = tiny.tokenize(texts)
    assert len(found) == 1500
    _check(found, [_encode(right, text) for text in texts])


@pytest.mark.parametrize("pad_to", [1, 5, 7, 40, 512])
def test_padding_to_a_length(tiny: Any, right: Any, pad_to: int) -> None:
    items: list[Any] = ["I love Paris", "", TEXTS["russian"], ("a", "pair"), ["some", "words"]]
    found = tiny.tokenize(items, pad_to=pad_to)
    _check(found, [_encode(right, item, padding="max_length", max_length=pad_to) for item in items])


def test_padding_without_special_tokens(tiny: Any, right: Any) -> None:
    found = tiny.tokenize(["", "I love Paris"], pad_to=6, add_special_tokens=False)
    wanted = [
        _encode(right, item, padding="max_length", max_length=6, add_special_tokens=False)
        for item in ("", "I love Paris")
    ]
    _check(found, wanted)
    assert found.token_counts.tolist() == [6, 6]


CUTTABLE: list[Any] = [
    "I love Paris in the springtime",
    TEXTS["joined emoji"],
    TEXTS["a long word"],
    ["tokenization", "", "of", "embeddings", "today"],
    ("one two three", "four five six seven eight nine ten"),
    ("one two three four five six seven eight", "nine ten"),
    ("one two three four", "five six seven eight"),
    ("one two three four five", "six seven eight nine"),
    ("", "one two three four five six"),
    ("one two three four five six", ""),
]


@pytest.mark.parametrize("special", [True, False], ids=["with specials", "without specials"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_length", [3, 4, 5, 6, 7, 8, 9, 11, 12, 13])
def test_truncation(tiny: Any, right: Any, left: Any, max_length: int, side: str, special: bool) -> None:
    found = tiny.tokenize(CUTTABLE, truncation=side, max_length=max_length, add_special_tokens=special)
    tokenizer = {"right": right, "left": left}[side]
    options = {"truncation": "longest_first", "max_length": max_length, "add_special_tokens": special}
    _check(found, [_encode(tokenizer, item, **options) for item in CUTTABLE])
    whole = [len(_encode(right, item, add_special_tokens=special)["input_ids"]) for item in CUTTABLE]
    assert found.truncated.tolist() == [count > max_length for count in whole]


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_to_the_model_is_at_512(tiny: Any, right: Any, left: Any, side: str) -> None:
    items: list[Any] = ["paris " * 510, "paris " * 511, ("one " * 300, "two " * 700), ["word"] * 600]
    tokenizer = {"right": right, "left": left}[side]
    found = tiny.tokenize(items, truncation=side)
    _check(found, [_encode(tokenizer, item, truncation="longest_first", max_length=512) for item in items])
    assert found.truncated.tolist() == [False, True, True, True]


def test_truncation_and_padding_together(tiny: Any, right: Any) -> None:
    items: list[Any] = ["I love Paris in the springtime", "a"]
    found = tiny.tokenize(items, truncation="right", max_length=6, pad_to=6)
    options = {"truncation": True, "padding": "max_length", "max_length": 6}
    _check(found, [_encode(right, item, **options) for item in items])


def test_tokenizing_may_go_beyond_what_the_model_embeds(tiny: Any, right: Any) -> None:
    found = tiny.tokenize("paris " * 900, max_length=1000)
    _check(found, [_encode(right, "paris " * 900)])
    assert found.token_counts.tolist() == [902]


@pytest.mark.parametrize("skip", [True, False], ids=["without specials", "with specials"])
def test_decoding(tiny: Any, right: Any, skip: bool) -> None:
    ids = [_encode(right, item)["input_ids"] for item in EVERYTHING]
    assert tiny.decode(ids, skip_special_tokens=skip) == right.batch_decode(ids, skip_special_tokens=skip)


def test_decoding_takes_one_text_several_or_tokens(tiny: Any, right: Any) -> None:
    ids = [101, 1045, 2293, 3000, 102, 0, 0]
    wanted = right.batch_decode([ids], skip_special_tokens=True)
    assert wanted == ["i love paris"]
    for given_ids in (ids, np.array(ids), [ids], np.array([ids]), TokenIds(ids), TokenIds([ids])):
        assert tiny.decode(given_ids) == wanted
    tokens = tiny.tokenize(["I love Paris", "no"], pad_to=6)
    assert tiny.decode(tokens) == ["i love paris", "no"]
    raw = [row.tolist() for row in tokens.input_ids]
    assert tiny.decode(tokens, skip_special_tokens=False) == right.batch_decode(raw, skip_special_tokens=False)
    assert tiny.decode([[], [101]]) == ["", ""]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_length", [3, 6, 9])
def test_embedding_with_truncation_embeds_the_cut_ids(
    tiny: Any, right: Any, left: Any, side: str, max_length: int
) -> None:
    items: list[Any] = [*CUTTABLE, "a"]
    tokenizer = {"right": right, "left": left}[side]
    cut = [_encode(tokenizer, item, truncation="longest_first", max_length=max_length) for item in items]
    wanted = tiny.embed(
        [TokenIds(one["input_ids"], one["attention_mask"], one["token_type_ids"]) for one in cut],
        layers="all",
        pooling="mean",
    )
    found = tiny.embed(items, layers="all", pooling="mean", truncation=side, max_length=max_length, return_tokens=True)
    longer = [len(_encode(right, item)["input_ids"]) > max_length for item in items]
    assert found.truncated.tolist() == longer and not wanted.truncated.any()
    assert found.tokens.truncated.tolist() == longer
    _check(found.tokens, cut)
    assert found.token_counts.tolist() == wanted.token_counts.tolist()
    for layer in wanted.layers:
        for mine, other in zip(found.ragged(layer), wanted.ragged(layer), strict=True):
            assert worst(mine, other) <= BOUND
    assert worst(found.pooled, wanted.pooled) <= BOUND
    streamed = list(tiny.embed_stream(items, pooling="mean", truncation=side, max_length=max_length))
    assert [bool(result.embedding.truncated[0]) for result in streamed] == longer
    for result in streamed:
        assert worst(result.embedding.pooled[0], wanted.pooled[result.index]) <= BOUND


@PROPERTY
@given(texts=st.lists(st.text(max_size=200), min_size=1, max_size=4), special=st.booleans())
def test_any_text(tiny: Any, right: Any, texts: list[str], special: bool) -> None:
    found = tiny.tokenize(texts, add_special_tokens=special)
    _check(found, [_encode(right, text, add_special_tokens=special) for text in texts])


@PROPERTY
@given(
    first=st.text(max_size=40),
    second=st.text(max_size=40),
    words=st.lists(st.text(max_size=10), min_size=1, max_size=8),
    max_length=st.integers(3, 20),
    side=st.sampled_from(["right", "left"]),
)
def test_any_text_cut_anywhere(
    tiny: Any, right: Any, left: Any, first: str, second: str, words: list[str], max_length: int, side: str
) -> None:
    items: list[Any] = [first, (first, second), words]
    found = tiny.tokenize(items, truncation=side, max_length=max_length)
    tokenizer = {"right": right, "left": left}[side]
    _check(found, [_encode(tokenizer, item, truncation="longest_first", max_length=max_length) for item in items])
