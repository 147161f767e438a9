"""What is made without offsets, and cut without tokenizing twice, is what the tokenizer's own whole result says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from support import family
from support.texts import EVERYTHING, PROPERTY
from tokenizers import models, pre_tokenizers, processors

from layertap.errors import LayertapError
from layertap_server.model.tokenized import Tokenized
from layertap_server.model.tokenizer import Tokenizer
from layertap_server.model.tokenizer_engine import Detail, TokenizerEngine
from layertap_server.types import Text

SCRIPTS = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from(list("aeiou -'.,éß東\u0301\u200d👩")), max_size=60
)


@pytest.fixture(scope="module")
def tokenizer(real_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    made: dict[str, Tokenizer] = {"real": Tokenizer(real_folder)}

    def of(kind: str) -> Tokenizer:
        if kind not in made:
            folder = tmp_path_factory.mktemp("tokenizers") / kind
            family.TOKENIZERS[kind]().save_pretrained(folder)
            made[kind] = Tokenizer(folder)
        return made[kind]

    return of


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
    labels = [f"item {n}" for n in range(len(items))]
    wanted = shown(tokenizer.encode(items, labels=labels, detail=Detail.EVERYTHING, **options))
    for detail in (Detail.NOTHING, Detail.SPECIAL_TOKENS):
        found = tokenizer.encode(items, labels=labels, detail=detail, **options)
        assert shown(found) == wanted
        for one in found:
            assert isinstance(one, LayertapError) or (one.encoding is None) == (detail is Detail.NOTHING)
    alone = [
        tokenizer.encode([item], labels=[label], detail=Detail.NOTHING, **options)[0]
        for item, label in zip(items, labels, strict=True)
    ]
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


def test_the_texts_of_a_group_share_one_array(tokenizer: Callable[[str], Tokenizer]) -> None:
    found = tokenizer("real").encode(
        ["I love Paris", "so does she"], labels=["0", "1"], max_length=9, truncation="error", detail=Detail.NOTHING
    )
    first, second = (one.text for one in found if isinstance(one, Tokenized))
    assert isinstance(first, Text) and first.input_ids.base is second.input_ids.base
    assert first.input_ids.dtype == np.int32
