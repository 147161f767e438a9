"""A prompt is as if it stood before each text, by all methods; where it cannot stand, the text is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import BOUND, worst
from support.in_process import serving
from support.sentence_folders import (
    QUERY,
    save_instructed,
)

from layertap import Client, InvalidArgumentError

QUERY_WORDS = ("Represent", "the", "query", ",", "please", ":")
SHORT = ["A guitar is played.", "", "漢字 and Ünïcode 😀", "Query"]


@pytest.fixture(scope="module")
def instructed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_instructed(tiny_folder, tmp_path_factory.mktemp("models") / "instructed")


@pytest.fixture(scope="module")
def prompted(instructed: Path) -> Iterator[Client]:
    """A client of a model whose folder has prompts, which it does not pool."""
    with serving(instructed) as address, Client(address) as client:
        yield client


def same(found: np.ndarray, wanted: np.ndarray) -> None:
    """Fails unless arrays are nowhere further apart than the bound."""
    assert worst(found, wanted) <= BOUND


def vectors(client: Any, method: str, texts: list[str], **options: Any) -> np.ndarray:
    """Returns the last layer's first row of each text, by any of the three methods."""
    if method == "embed":
        return client.embed(texts, **options).last_hidden_state[:, 0]
    if method == "embed_layers":
        parts = list(client.embed_layers(texts, layers=[-1], **options))
        found = {text: rows[0] for part in parts for text, rows in zip(part.texts, part.rows, strict=True)}
        return np.stack([found[n] for n in range(len(texts))])
    return np.stack([one.embedding.last_hidden_state[0, 0] for one in client.embed_stream(texts, **options)])


@pytest.mark.parametrize("method", ["embed", "embed_layers", "embed_stream"])
def test_a_prompt_is_as_if_it_stood_before_each_text(tiny: Any, method: str) -> None:
    found = vectors(tiny, method, SHORT, prompt="query: ")
    same(found, vectors(tiny, method, ["query: " + text for text in SHORT]))
    assert np.abs(found - vectors(tiny, method, SHORT)).max() > 0.01
    same(vectors(tiny, method, SHORT, prompt_name="query"), vectors(tiny, method, SHORT))


@pytest.mark.parametrize("method", ["embed", "embed_stream"])
def test_words_of_a_named_prompt_are_strings_too(method: str, prompted: Client) -> None:
    for options in ({"prompt_name": "query"}, {"prompt": QUERY}):
        for text, own in (("I love Paris", ("I", "love", "Paris")), (("I love", "Rome"), ("I", "love", "Rome"))):
            found = getattr(prompted, method)([text], words="mean", **options)
            words = found.words if method == "embed" else next(iter(found)).embedding.words
            assert words.strings == ((*QUERY_WORDS, *own),)


def test_tokens_are_those_of_the_prompt_too(tiny: Any) -> None:
    tokens = tiny.embed("Paris", prompt="to ", return_tokens=True).tokens
    assert tokens.tokens == [["[CLS]", "to", "paris", "[SEP]"]]
    assert tokens.offset_mapping[0, 2].tolist() == [3, 8]


def test_a_text_that_is_all_prompt_has_nothing_to_pool(prompted: Client) -> None:
    # A prompt is counted by itself, and this one has more pieces than it has together with the text.
    alone, together = prompted.tokenize(["unknow", "unknown"]).token_counts.tolist()
    assert alone - 1 >= together
    for strategy in ("mean", "cls", "last"):
        with pytest.raises(InvalidArgumentError, match=r"inputs\[0\] has nothing to pool over"):
            prompted.embed(["n"], prompt="unknow", pooling=strategy)
