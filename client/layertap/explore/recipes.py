"""The lines of Python that give the numbers of a picture: what "copy as Python" copies.

Each picture's arrays have the names that these lines give them; `name_0` and `name_1` are those of a list `name`. The
tests run the lines and compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from layertap._protocol.options import LengthOptions
from layertap.types import PoolingName

_SENTENCES_SHOWN: Final = 50
"""More sentences are not written out: the lines read them from a file."""

ALL_LAYERS: Final = 'embedding = client.embed(texts, layers="all"{options}, return_tokens=True)'

DIFFERENCES: Final = (
    "def ids(n, count, mask):",
    "    return TokenIds(",
    "        input_ids=tokens.input_ids[n, :count],",
    "        attention_mask=mask,",
    "        token_type_ids=tokens.token_type_ids[n, :count],",
    "    )",
    "real, counts = tokens.attention_mask.sum(1), tokens.token_counts",
    'before = client.embed([ids(n, real[n], [1] * real[n]) for n in range(len(texts))], layers="all")',
    'after = client.embed([ids(n, counts[n], masks[n]) for n in range(len(texts))], layers="all")',
    "pairs = [analysis.differences(before, after, text=n) for n in range(len(texts))]",
    "cosine, difference = [pair[0] for pair in pairs], [pair[1] for pair in pairs]",
)
"""How far other masks, in `masks`, move the rows."""


def lines(target: str, texts: Sequence[str], *rest: str, cut: LengthOptions, imports: str = "Client, analysis") -> str:
    """Returns a program: lines that make a client and `texts`, and the rest, in which `{options}` stands for `cut`."""
    opening = [f"from layertap import {imports}", "", f"client = Client({target!r})", f"texts = {list(texts)!r}"]
    return "\n".join([*opening, *(line.replace("{options}", options(cut)) for line in rest), ""])


def options(cut: LengthOptions) -> str:
    """Returns arguments of a call that are not the default, each with a comma before it."""
    return "".join(f", {name}={value!r}" for name, value in cut.items() if value not in ("error", None))


def poolings(strategy: PoolingName, layer_count: int, has_special: bool) -> str:
    """Returns the expression of one pooling for each layer."""
    special = "" if has_special else ", include_special_tokens=False"
    return f"analysis.each_layer({strategy!r}, {layer_count}{special})"


def tokens(pad_to: int | None, has_special: bool) -> str:
    """Returns the line that tokenizes."""
    padding = "" if pad_to is None else f", pad_to={pad_to}"
    special = "" if has_special else ", add_special_tokens=False"
    return "tokens = client.tokenize(texts" + padding + special + "{options})"


def sentences(found: Sequence[str]) -> str:
    """Returns the line that has the sentences, or reads them."""
    if len(found) > _SENTENCES_SHOWN:
        return 'sentences = open("sentences.txt", encoding="utf-8").read().splitlines()'
    return f"sentences = {list(found)!r}"
