"""What is made without offsets, and cut without tokenizing twice, is what the tokenizer's own whole result says."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support import family
from support.texts import EVERYTHING, PROPERTY, TEXTS
from tokenizers import models, pre_tokenizers, processors

from layertap.errors import InvalidArgumentError, LayertapError
from layertap_server.model import text_head
from layertap_server.model.tokenized import Tokenized
from layertap_server.model.tokenizer import Tokenizer
from layertap_server.model.tokenizer_engine import Detail, TokenizerEngine, Tokenizing
from layertap_server.types import Text, Windowing

SCRIPTS = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from(list("aeiou -'.,éß東\u0301\u200d👩")), max_size=60
)


@pytest.fixture(scope="module")
def folder(real_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @functools.cache
    def of(kind: str) -> Path:
        if kind == "real":
            return real_folder
        made = tmp_path_factory.mktemp("tokenizers") / kind
        family.TOKENIZERS[kind]().save_pretrained(made)
        return made

    return of


@pytest.fixture(scope="module")
def tokenizer(folder: Callable[[str], Path]) -> Callable[[str], Tokenizer]:
    return functools.cache(lambda kind: Tokenizer(folder(kind)))


@pytest.fixture(scope="module")
def theirs(folder: Callable[[str], Path]) -> Callable[[str], Any]:
    return functools.cache(lambda kind: transformers.AutoTokenizer.from_pretrained(folder(kind)))


def shown(found: Sequence[Tokenized | LayertapError]) -> list[Any]:
    """Returns what can be compared of results, their types as numbers even where all are 0."""
    return [
        one.details
        if isinstance(one, LayertapError)
        else (
            one.text.input_ids.tolist(),
            [0] * one.text.token_count if one.text.token_type_ids is None else one.text.token_type_ids.tolist(),
            one.truncated,
        )
        for one in found
    ]


def check(tokenizer: Tokenizer | TokenizerEngine, items: Sequence[Any], **options: Any) -> None:
    def encode(items: Sequence[Any], labels: list[str], detail: Detail) -> list[Tokenized | LayertapError]:
        return tokenizer.encode(items, labels, Tokenizing(detail=detail, **options))

    labels = [f"item {n}" for n in range(len(items))]
    wanted = shown(encode(items, labels, Detail.EVERYTHING))
    for detail in (Detail.NOTHING, Detail.SPECIAL_TOKENS):
        found = encode(items, labels, detail)
        assert shown(found) == wanted
        for one in found:
            assert isinstance(one, LayertapError) or (one.encoding is None) == (detail is Detail.NOTHING)
    alone = [encode([item], [label], Detail.NOTHING)[0] for item, label in zip(items, labels, strict=True)]
    assert shown(alone) == wanted


@pytest.mark.parametrize("kind", ["real", "bert", "camembert", "roberta", "xlm-roberta"])
@pytest.mark.parametrize("lower_case", [False, True])
@pytest.mark.parametrize("add_special_tokens", [True, False], ids=["special", "bare"])
def test_ids_and_types_are_the_same_whatever_else_is_asked_for(
    tokenizer: Callable[[str], Tokenizer], kind: str, lower_case: bool, add_special_tokens: bool
) -> None:
    options = {"lower_case": lower_case, "add_special_tokens": add_special_tokens}
    for truncation in ("error", "right", "left"):
        for max_length in (1, 2, 3, 4, 5, 9, 512):
            check(tokenizer(kind), EVERYTHING, max_length=max_length, truncation=truncation, **options)


@settings(PROPERTY)
@given(texts=st.lists(SCRIPTS, min_size=1, max_size=5), max_length=st.integers(2, 40))
def test_any_text_of_any_script(tokenizer: Callable[[str], Tokenizer], texts: list[str], max_length: int) -> None:
    for kind in ("real", "roberta", "xlm-roberta"):
        for truncation in ("error", "right", "left"):
            check(tokenizer(kind), texts, max_length=max_length, truncation=truncation)


LONG = st.lists(SCRIPTS | st.sampled_from(list(TEXTS.values())), min_size=1, max_size=4).map(
    lambda parts: " ".join([*parts, ""]) * (1 + 3_000 // (1 + sum(map(len, parts))))
)


@settings(PROPERTY, max_examples=40)
@given(text=LONG, max_length=st.integers(2, 40), with_offsets=st.booleans())
def test_the_beginning_of_a_long_text_is_cut_as_the_whole(
    tokenizer: Callable[[str], Tokenizer], theirs: Callable[[str], Any], text: str, max_length: int, with_offsets: bool
) -> None:
    for kind in ("real", "bert", "camembert", "roberta", "xlm-roberta"):
        detail = Detail.EVERYTHING if with_offsets else Detail.NOTHING
        for item in (text, text.split() or [""]):
            wanted = theirs(kind)(
                [item], is_split_into_words=isinstance(item, list), truncation=True, max_length=max_length
            ).encodings[0]
            (found,) = tokenizer(kind).encode(
                [item], ["it"], Tokenizing(max_length=max_length, truncation="right", detail=detail)
            )
            assert isinstance(found, Tokenized)
            assert found.text.input_ids.tolist() == wanted.ids
            if found.encoding is not None:
                assert found.encoding.offsets == wanted.offsets and found.encoding.word_ids == wanted.word_ids


@pytest.mark.parametrize("kind", ["real", "bert", "camembert", "roberta", "xlm-roberta"])
def test_what_truncation_drops_is_not_tokenized(tokenizer: Callable[[str], Tokenizer], kind: str) -> None:
    def cpu_s(text: str, truncation: str) -> float:
        started = time.thread_time()
        tokenizer(kind).encode(
            [text],
            ["it"],
            Tokenizing(max_length=64, truncation=truncation, detail=Detail.NOTHING, add_special_tokens=True),
        )
        return time.thread_time() - started

    long = "I love Paris " * 7_000
    assert min(cpu_s(long, "right") for _ in range(3)) < min(cpu_s(long, "error") for _ in range(3)) / 4


STRANGE = {
    "a word with a space": {"added_tokens": [{"content": "New York"}], "pre_tokenizer": {"type": "Whitespace"}},
    "a pattern of its own": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "x"}}},
    "nothing splits": {"pre_tokenizer": {"type": "Digits"}},
    "a whole text as one": {"pre_tokenizer": {"type": "Metaspace", "split": False}},
    "replacement": {
        "pre_tokenizer": {"type": "Whitespace"},
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"Regex": "a.*b"}}]},
    },
    "none at all": {},
}


@pytest.mark.parametrize("tokenizer_json", STRANGE.values(), ids=STRANGE.keys())
def test_a_tokenizer_that_may_look_farther_reads_whole_texts(tokenizer_json: dict[str, Any]) -> None:
    assert not text_head.is_local(tokenizer_json)


def test_pairs_and_short_texts_have_no_head() -> None:
    for item in ("word " * 200, ("word " * 50_000, "b"), ["word"] * 100, "a" * 100_000, " " * 100_000):
        assert text_head.head(item, 10) is item


TEMPLATES = {
    "none": None,
    "types of a lone text": "[CLS]:1 $A:1 [SEP]:1",
    "only before": "[CLS] [CLS] $A",
    "only after": "$A [SEP] [SEP]",
    "in between": "[CLS] $A [SEP] $A [SEP]",
    "nothing of the text": "[CLS] [SEP]",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize("known", [["a", "b", "c"], ["b", "c"]], ids=["a", "without a"])
def test_whatever_a_tokenizer_puts_around_a_text(template: str | None, known: list[str]) -> None:
    vocabulary = {word: n for n, word in enumerate(["[CLS]", "[SEP]", *known])}
    whole = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        whole.post_processor = processors.TemplateProcessing(
            single=template, pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
        )
    engine = TokenizerEngine(whole, has_token_types=True)
    items = ["", "b", "b c b c", "c " * 9, ("b c b", "c"), "z b", "c b"]
    for truncation in ("error", "right", "left"):
        for max_length in range(1, 8):
            for special in (True, False):
                options = {"max_length": max_length, "truncation": truncation, "add_special_tokens": special}
                check(engine, items, **options)
                check(engine, [["b", "c", "b", "c"], ["c"], []], **options)


@pytest.mark.parametrize("text", ["", "b c b c"])
def test_windows_without_room_beside_the_special_tokens_are_refused(text: str) -> None:
    whole = tokenizers.Tokenizer(models.WordLevel({"[CLS]": 0, "[SEP]": 1, "b": 2, "c": 3}, unk_token="[UNK]"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whole.post_processor = processors.TemplateProcessing(
        single="[CLS] [CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    how = Tokenizing(max_length=2, truncation="error", windowing=Windowing(stride=0, max_count=9))
    (found,) = TokenizerEngine(whole, has_token_types=False).encode([text], ["inputs[0]"], how)
    assert isinstance(found, InvalidArgumentError)
    assert re.search(r"inputs\[0\] has 3 special tokens.* max_length is 2; raise max_length", found.details)


def test_the_texts_of_a_group_share_one_array(tokenizer: Callable[[str], Tokenizer]) -> None:
    found = tokenizer("real").encode(
        ["I love Paris", "so does she"], ["0", "1"], Tokenizing(max_length=9, truncation="error", detail=Detail.NOTHING)
    )
    first, second = (one.text for one in found if isinstance(one, Tokenized))
    assert isinstance(first, Text) and first.input_ids.base is second.input_ids.base
    assert first.input_ids.dtype == np.int32
