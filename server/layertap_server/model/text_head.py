"""The beginning of a text, where truncation drops the rest: so that what is dropped is not tokenized.

Only for tokenizers that are known to look no farther than from one space to the next: each text is cut at a space, with
more than enough before it, and the last tokens before the cut are never used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import tokenizers

String: TypeAlias = "str | tuple[str, str] | list[str]"
"""A string, a pair, or words."""

_MARGIN_TOKENS: Final = 64
"""So many tokens before the cut are not used."""
_TOKEN_CHARACTERS: Final = 8
"""What a token takes, on average, with some to spare; a text whose tokens take more is tokenized as a whole."""

_UNICODE_FORMS: Final = ("NFC", "NFD", "NFKC", "NFKD")
_LOCAL_NORMALIZERS: Final = frozenset(
    ["BertNormalizer", "Lowercase", "Nmt", "Precompiled", "Prepend", "Strip", "StripAccents", *_UNICODE_FORMS]
)
_LOCAL_PATTERNS: Final = ({"Regex": " {2,}"}, {"Regex": "\\s+"}, {"String": " "})
_SPLITTERS: Final = frozenset(["BertPreTokenizer", "Whitespace", "WhitespaceSplit"])
"""Pre-tokenizers that split at every space."""
_LOCAL_PRE_TOKENIZERS: Final = _SPLITTERS | {"ByteLevel", "Digits", "Metaspace", "Punctuation"}


def is_local(tokenizer: Mapping[str, Any]) -> bool:
    """Returns whether the tokens of a text before a space do not depend on what comes after, by its tokenizer.json."""
    splits = False
    for one in _parts(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        kind = one["type"]
        if kind not in _LOCAL_PRE_TOKENIZERS:
            return False
        splits = splits or kind in _SPLITTERS
        splits = splits or (kind == "ByteLevel" and one.get("use_regex", True))
        splits = splits or (kind == "Metaspace" and one.get("split", True))
    for one in _parts(tokenizer.get("normalizer"), "normalizers"):
        if one["type"] not in _LOCAL_NORMALIZERS and not (
            one["type"] == "Replace" and one.get("pattern") in _LOCAL_PATTERNS
        ):
            return False
    return splits and not any(" " in one["content"] for one in tokenizer.get("added_tokens") or ())


def head(item: String, max_length: int) -> String:
    """Returns the beginning of a string, or of words, that has far more than so many tokens; pairs stay whole."""
    enough = max_length + _MARGIN_TOKENS
    if isinstance(item, str):
        most = _TOKEN_CHARACTERS * enough
        at = len(item) if len(item) <= 2 * most else item.find(" ", most, 2 * most)
        while 0 < at < len(item) - 1 and (item[at - 1].isspace() or item[at + 1].isspace()):
            at = item.find(" ", at + 1, 2 * most)
        return item[:at] if at > 0 else item
    if isinstance(item, list) and len(item) > 2 * enough:
        return item[:enough]
    return item


def is_enough(encoding: tokenizers.Encoding, max_length: int) -> bool:
    """Returns whether the tokens of a head are all that is needed to cut the text."""
    return len(encoding) >= max_length + _MARGIN_TOKENS


def _parts(one: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """Returns what a sequence of normalizers or pre-tokenizers is made of."""
    if one is None:
        return []
    if one["type"] == "Sequence":
        return [part for own in one[inner] for part in _parts(own, inner)]
    return [one]
