"""What the page asks for, read from its JSON and checked; the server checks the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast, get_args

from layertap._protocol.options import LengthOptions
from layertap.analysis import each_layer
from layertap.errors import InvalidArgumentError
from layertap.types import Pooling, PoolingName, TruncationName

MAX_TEXTS: Final = 2
"""Texts that the page compares; neighbours may be many more."""

MAX_SENTENCES: Final = 2000
MAX_COPIES: Final = 256


class Request:
    """The fields of one request of the page."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields

    @property
    def texts(self) -> tuple[str, ...]:
        """One or two texts."""
        return self.strings("texts", MAX_TEXTS)

    @property
    def cut(self) -> LengthOptions:
        """How long a text may be."""
        truncation = self.choice("truncation", get_args(TruncationName), "error")
        return {"truncation": cast("TruncationName", truncation), "max_length": self.number("max_length")}

    def strings(self, name: str, most: int) -> tuple[str, ...]:
        """Returns a list of at least one string, and at most so many.

        Raises:
            InvalidArgumentError: if it is not that.
        """
        found = self._fields.get(name)
        if not isinstance(found, list) or not found or not all(isinstance(one, str) for one in found):
            raise InvalidArgumentError(f"{name} is not a list of strings; write at least one text")
        if len(found) > most:
            raise InvalidArgumentError(f"{name} has {len(found)} entries, the page takes {most}; remove some")
        return tuple(found)

    def number(self, name: str, least: int = 1, most: int = 1 << 30) -> int | None:
        """Returns a whole number, or None if there is none.

        Raises:
            InvalidArgumentError: if it is something else, or out of bounds.
        """
        found = self._fields.get(name)
        if found is None:
            return None
        if isinstance(found, bool) or not isinstance(found, int) or not least <= found <= most:
            raise InvalidArgumentError(f"{name} is not a whole number from {least} to {most}")
        return found

    def text(self, name: str) -> str | None:
        """Returns a string, or None if there is none.

        Raises:
            InvalidArgumentError: if it is something else.
        """
        found = self._fields.get(name)
        if found is not None and not isinstance(found, str):
            raise InvalidArgumentError(f"{name} is not a string")
        return found

    @property
    def file(self) -> tuple[str, bytes]:
        """A file's name and its bytes.

        Raises:
            InvalidArgumentError: if there is none.
        """
        found = self._fields.get("file")
        if not isinstance(found, bytes):
            raise InvalidArgumentError("there is no file; choose one")
        return str(self._fields["file_name"]), found

    def flag(self, name: str, default: bool) -> bool:
        """Returns whether something is chosen.

        Raises:
            InvalidArgumentError: if it is neither true nor false.
        """
        found = self._fields.get(name, default)
        if not isinstance(found, bool):
            raise InvalidArgumentError(f"{name} is neither true nor false")
        return found

    def choice(self, name: str, choices: Sequence[str], default: str) -> str:
        """Returns one of some names.

        Raises:
            InvalidArgumentError: if it is none of them.
        """
        found = self._fields.get(name, default)
        if found not in choices:
            raise InvalidArgumentError(f"{name} is unknown; use one of {', '.join(choices)}")
        return cast("str", found)

    def poolings(self, layer_count: int) -> list[Pooling]:
        """Returns the chosen pooling for each layer."""
        strategy = cast("PoolingName", self.choice("pooling", get_args(PoolingName), "mean"))
        return each_layer(strategy, layer_count, include_special_tokens=self.flag("special_tokens", True))

    def masks(self) -> list[list[int]] | None:
        """Returns an attention mask for each text, or None for the tokenizer's.

        Raises:
            InvalidArgumentError: if they are no lists of whole numbers.
        """
        found = self._fields.get("masks")
        if found is None:
            return None
        if not isinstance(found, list) or not all(_is_numbers(row) for row in found):
            raise InvalidArgumentError("masks are not lists of 0 and 1")
        return found

    def tokens(self, name: str) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Returns two tokens, each as the position of its text and its own, or None.

        Raises:
            InvalidArgumentError: if they are no pairs of positions.
        """
        found = self._fields.get(name)
        if found is None:
            return None
        if not (isinstance(found, list) and [_is_numbers(one) and len(one) for one in found] == [2, 2]):
            raise InvalidArgumentError(f"{name} is not two tokens, each a text and a position")
        return (found[0][0], found[0][1]), (found[1][0], found[1][1])


def _is_numbers(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(one, int) and one >= 0 for one in found)
