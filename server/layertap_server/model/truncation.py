"""Cutting texts to a length as their tokenizer cuts them: by a tokenizer that truncates, or by leaving out ids.

Ids are left out only where a probe has shown that the tokenizer does the same: where special tokens stand around a
text, and not within it. Thread-safe, without a lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Final

import numpy as np
import tokenizers

from layertap_server.types import Ids

_PROBE: Final = "a b a b"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """The special tokens around one text that is no pair, whatever the text.

    Attributes:
        before: How many stand before it.
        after: How many stand after it.
        has_types: Whether types may be other than 0. They depend on nothing but the place in a pair.
        can_cut: Whether `cut` does what the tokenizer does.
    """

    before: int = 0
    after: int = 0
    has_types: bool = True
    can_cut: bool = True

    def cut(self, ids: Ids, length: int, direction: str) -> Ids:
        """Returns so many of the ids of a longer text; the special ones stay."""
        end = len(ids) - self.after
        if direction == "left":
            return np.concatenate([ids[: self.before], ids[end - (length - self.before - self.after) :]])
        return np.concatenate([ids[: length - self.after], ids[end:]])


class Truncation:
    """Cuts the texts of one tokenizer."""

    def __init__(self, whole: tokenizers.Tokenizer) -> None:
        """Tries what special tokens the tokenizer, which does not truncate, puts around a text."""
        self._whole = whole
        # Truncation is a state of a tokenizer: texts that need it have another, which no other thread has meanwhile.
        self._cutters = [copy(whole)]
        self._frames = {special: self._frame(special) for special in (False, True)}

    def may_have_types(self, *, add_special_tokens: bool) -> bool:
        """Returns whether a text that is no pair may have types other than 0."""
        return self._frames[add_special_tokens].has_types

    def cut(self, ids: Ids, length: int, direction: str, *, add_special_tokens: bool) -> Ids | None:
        """Returns so many of the ids of a longer text; None: only a tokenizer that truncates can say which.

        The ids are those of a text that is no pair, and the length is at least that of their special tokens. The
        direction is the side that is cut, "right" or "left".
        """
        frame = self._frames[add_special_tokens]
        return frame.cut(ids, length, direction) if frame.can_cut else None

    @contextlib.contextmanager
    def cutter(self, length: int, direction: str) -> Iterator[tokenizers.Tokenizer]:
        """Yields a tokenizer that truncates, which no other thread has meanwhile."""
        try:
            cutter = self._cutters.pop()
        except IndexError:
            cutter = copy(self._whole)
        try:
            cutter.enable_truncation(length, strategy="longest_first", direction=direction)
            yield cutter
        finally:
            self._cutters.append(cutter)

    def _frame(self, add_special_tokens: bool) -> _Frame:
        """Returns what stands around a text, if cuts of it are proved equal to those of the tokenizer."""
        try:
            one = self._whole.encode(_PROBE, add_special_tokens=add_special_tokens)
            own = [n for n, special in enumerate(one.special_tokens_mask) if not special]
            frame = _Frame(before=own[0], after=len(one.ids) - 1 - own[-1], has_types=any(one.type_ids))
            ids = np.array(one.ids, np.int32)
            for direction, length in itertools.product(("right", "left"), range(frame.before + frame.after, len(ids))):
                with self.cutter(length, direction) as cutter:
                    cut = cutter.encode(_PROBE, add_special_tokens=add_special_tokens)
                if cut.ids != frame.cut(ids, length, direction).tolist():
                    return _Frame(can_cut=False)
        except Exception:  # The library raises `Exception` itself, such as for an unknown token that it lacks.
            return _Frame(can_cut=False)
        return frame


def copy(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Returns a tokenizer that does the same, and shares the vocabulary where that can be proved."""
    copied = tokenizers.Tokenizer(tokenizer.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (own := getattr(tokenizer, part)) is not None:
            setattr(copied, part, own)
    for _, token in sorted(tokenizer.get_added_tokens_decoder().items()):
        (copied.add_special_tokens if token.special else copied.add_tokens)([token])
    if copied.to_str() != tokenizer.to_str():
        copied = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    copied.encode_special_tokens = tokenizer.encode_special_tokens  # Not part of its JSON.
    return copied
