"""One configuration of the tokenizers library: strings, pairs and words in, ids out, all texts of a group at once.

Rules:
- Offsets and words are made only where an answer needs them: the library is then slower by a fifth. Ids are the same.
- The ids of a group are one array; each text has a view of it.
- Of a long text that is cut on the right only the beginning is tokenized; see `text_head`.
- Thread-safe, without a lock. A text that the library fails on harms no other.
"""

from __future__ import annotations

import array
import dataclasses
import enum
import itertools
import json
import logging
from collections.abc import Sequence
from typing import Final

import numpy as np
import tokenizers

from layertap.errors import InvalidArgumentError, LayertapError
from layertap_server.model import text_head
from layertap_server.model.files import reason_of
from layertap_server.model.text_head import String
from layertap_server.model.tokenized import Tokenized
from layertap_server.model.truncation import Truncation
from layertap_server.types import Ids, Text, Windowing, Windows

log = logging.getLogger(__name__)

_SHORT: Final = 128
"""Characters up to which a lone text is tokenized on this thread, without letting go of the interpreter."""


class Detail(enum.Enum):
    """What is asked of a text beside its ids and types."""

    NOTHING = enum.auto()
    SPECIAL_TOKENS = enum.auto()
    """Which tokens are special."""
    EVERYTHING = enum.auto()
    """The tokenizer's own result, with offsets and words."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizing:
    """How texts are tokenized.

    Attributes:
        max_length: The most tokens of one text, special tokens counted.
        truncation: "error", "right" or "left".
        add_special_tokens: Whether the tokenizer adds its special tokens.
        lower_case: Whether strings are turned to lower case before anything else.
        detail: What is asked of each text beside ids and types.
        windowing: How strings and words above max_length run as windows; None: they do not.
        longest: What the caller may raise max_length to; it tells one whose text is longer.
    """

    max_length: int
    truncation: str
    add_special_tokens: bool = True
    lower_case: bool = False
    detail: Detail = Detail.EVERYTHING
    windowing: Windowing | None = None
    longest: int = 0


class TokenizerEngine:
    """One way of tokenizing, with and without truncation."""

    def __init__(self, whole: tokenizers.Tokenizer, *, has_token_types: bool) -> None:
        """Prepares a tokenizer that does not truncate, for a model that may be given its token types."""
        self._whole = whole
        self._has_token_types = has_token_types
        self._truncation = Truncation(whole)
        self._may_have_types = {
            special: self._truncation.may_have_types(add_special_tokens=special) for special in (False, True)
        }
        self._is_local = text_head.is_local(json.loads(whole.to_str()))

    def encode(
        self, items: Sequence[String], labels: Sequence[str], how: Tokenizing
    ) -> list[Tokenized | LayertapError]:
        """Returns for each text its tokens, or why it is refused; of the texts either all are words, or none."""
        results: list[Tokenized | LayertapError] = []
        max_length = how.max_length
        if self._is_local and how.truncation == "right":
            heads, encodings = self._heads(items, labels, how)
        else:
            heads, encodings = items, self._encode_each(items, labels, how)
        texts = self._texts(items, encodings, how)
        for n, (encoding, text, item, label) in enumerate(zip(encodings, texts, items, labels, strict=True)):
            if isinstance(encoding, LayertapError):
                results.append(encoding)
            elif len(text.input_ids) <= max_length:
                results.append(_tokenized(text, item, encoding, how))
            elif how.windowing is not None:
                found = _windowed(text, item, encoding, label, max_length, how.windowing)
                results.append(found if isinstance(found, LayertapError) else _tokenized(found, item, encoding, how))
            elif how.truncation == "error":
                raised = f"raise max_length, which may be {how.longest}, " if how.longest > max_length else ""
                results.append(
                    InvalidArgumentError(
                        f"{label} has {text.token_count} tokens, max_length is {max_length}; shorten it, {raised}"
                        "cut it with truncation right or left, or let it run as windows"
                    )
                )
            else:
                results.append(self._cut(item, heads[n], text, label, how))
        return results

    def ids(self, text: str) -> list[int]:
        """Returns the ids of one string, special tokens included."""
        return self._whole.encode(text).ids

    def _heads(
        self, items: Sequence[String], labels: Sequence[str], how: Tokenizing
    ) -> tuple[Sequence[String], list[tokenizers.Encoding | LayertapError]]:
        """Returns as much of each text as its cut on the right needs, and its tokens."""
        heads = [text_head.head(item, how.max_length) for item in items]
        encodings = self._encode_each(heads, labels, how)
        for n, one in enumerate(encodings):
            is_enough = not isinstance(one, LayertapError) and text_head.is_enough(one, how.max_length)
            if heads[n] is not items[n] and not is_enough:
                heads[n] = items[n]
                (encodings[n],) = self._encode_each([items[n]], [labels[n]], how)
        return heads, encodings

    def _encode_each(
        self, items: Sequence[String], labels: Sequence[str], how: Tokenizing
    ) -> list[tokenizers.Encoding | LayertapError]:
        try:
            return [*self._encode(self._whole, items, how)]
        except Exception as exc:  # The library raises `Exception` itself, such as for an unknown token that it lacks.
            if len(items) == 1:
                log.warning("the tokenizer failed on a text: %s", reason_of(exc))
                return [
                    InvalidArgumentError(
                        f"the model's tokenizer cannot tokenize {labels[0]} (its vocabulary may lack the unknown "
                        "token); leave the text out, or send token_ids"
                    )
                ]
        return [
            one for item, label in zip(items, labels, strict=True) for one in self._encode_each([item], [label], how)
        ]

    @staticmethod
    def _encode(
        tokenizer: tokenizers.Tokenizer, items: Sequence[String], how: Tokenizing
    ) -> Sequence[tokenizers.Encoding]:
        if len(items) == 1 and isinstance(items[0], str) and len(items[0]) <= _SHORT:
            return [tokenizer.encode(items[0], None, False, how.add_special_tokens)]
        # The fast one may give the second text of a pair the type 0.
        whole = how.detail is Detail.EVERYTHING or tuple in map(type, items)
        encode = tokenizer.encode_batch if whole else tokenizer.encode_batch_fast
        return encode(items, is_pretokenized=isinstance(items[0], list), add_special_tokens=how.add_special_tokens)

    def _texts(
        self, items: Sequence[String], encodings: Sequence[tokenizers.Encoding | LayertapError], how: Tokenizing
    ) -> list[Text]:
        """Returns texts with their ids, and their types unless all are 0; without ids for what failed."""
        ids = _views([[] if isinstance(one, LayertapError) else one.ids for one in encodings])
        has_types = self._may_have_types[how.add_special_tokens] or tuple in map(type, items)
        if not (self._has_token_types and has_types):
            return list(map(Text, ids))
        types = _views([[] if isinstance(one, LayertapError) else one.type_ids for one in encodings])
        return [Text(own, token_type_ids=of if of.any() else None) for own, of in zip(ids, types, strict=True)]

    def _cut(self, item: String, head: String, whole: Text, label: str, how: Tokenizing) -> Tokenized | LayertapError:
        max_length, direction, add_special_tokens = how.max_length, how.truncation, how.add_special_tokens
        special = self._whole.num_special_tokens_to_add(isinstance(item, tuple)) if add_special_tokens else 0
        if max_length < special:
            return InvalidArgumentError(
                f"{label} needs {special} special tokens, max_length is {max_length}; raise max_length"
            )
        if how.detail is Detail.NOTHING and not isinstance(item, tuple) and whole.token_type_ids is None:
            ids = self._truncation.cut(whole.input_ids, max_length, direction, add_special_tokens=add_special_tokens)
            if ids is not None:
                return Tokenized(text=Text(ids), truncated=True)
        with self._truncation.cutter(max_length, direction) as cutter:
            (encoding,) = self._encode(cutter, [head], how)
        (text,) = self._texts([item], [encoding], how)
        return _tokenized(text, item, encoding, how, truncated=True)


def _views(lists: Sequence[list[int]]) -> list[Ids]:
    """Returns lists of numbers as views of one array."""
    if len(lists) == 1:
        return [np.array(lists[0], np.int32)]
    numbers = array.array("i")
    for one in lists:
        numbers.fromlist(one)
    whole = np.frombuffer(numbers, np.int32)
    ends = itertools.accumulate(map(len, lists))
    return [whole[end - len(one) : end] for one, end in zip(lists, ends, strict=True)]


def _windowed(
    text: Text, item: String, encoding: tokenizers.Encoding, label: str, max_length: int, windowing: Windowing
) -> Text | LayertapError:
    """Returns a text that runs as windows; they are counted before anything is made of it."""
    count = text.token_count
    if isinstance(item, tuple):
        return InvalidArgumentError(
            f"{label} is a pair of {count} tokens, max_length is {max_length}, and only strings and words run as "
            "windows; shorten it, or cut it with truncation right or left"
        )
    own = np.flatnonzero(np.array(encoding.special_tokens_mask) == 0)
    prefix_count, suffix_count = (int(own[0]), count - 1 - int(own[-1])) if len(own) else (count, 0)
    special_count = prefix_count + suffix_count
    most = max_length - special_count - 1
    if most < 0:
        return InvalidArgumentError(
            f"{label} has {special_count} special tokens in each window, max_length is {max_length}; raise max_length"
        )
    if not windowing.stride <= most:
        return InvalidArgumentError(
            f"{label} has {special_count} special tokens, so with max_length {max_length} the stride of "
            f"windows is at most {most}; lower it, or raise max_length"
        )
    windows = Windows(
        token_count=count,
        max_length=max_length,
        stride=windowing.stride,
        prefix_count=prefix_count,
        suffix_count=suffix_count,
    )
    if windows.count > windowing.max_count:
        return InvalidArgumentError(
            f"{label} has {count} tokens, which are {windows.count} windows, the most is {windowing.max_count}; split "
            "it into several texts, or lower the stride"
        )
    return dataclasses.replace(text, windows=windows)


def _tokenized(
    text: Text, item: String, encoding: tokenizers.Encoding, how: Tokenizing, *, truncated: bool = False
) -> Tokenized:
    if how.detail is Detail.NOTHING:
        return Tokenized(text=text, truncated=truncated)
    given_word_count = len(item) if isinstance(item, list) else None
    return Tokenized(text=text, truncated=truncated, encoding=encoding, given_word_count=given_word_count)
