"""What the page asks for, read from its JSON and checked; the server checks the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias, TypeVar, get_args

from layertap._protocol.options import LengthOptions
from layertap.analysis import each_layer
from layertap.errors import InvalidArgumentError
from layertap.types import Pooling, PoolingName, TruncationName

MAX_TEXTS: Final = 2
"""Texts that the page compares; neighbours may be many more."""

MAX_SENTENCES: Final = 2000
MAX_COPIES: Final = 256

Place: TypeAlias = tuple[int, int]
"""A token: the position of its text, and its own in that text."""

Value = TypeVar("Value")


class Request:
    """The fields of one request of the page. What reads one raises `InvalidArgumentError` if the field does not fit."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields

    @property
    def texts(self) -> tuple[str, ...]:
        """One or two texts."""
        return self.strings("texts", MAX_TEXTS)

    @property
    def cut(self) -> LengthOptions:
        """How long a text may be."""
        truncation = self._choice("truncation", get_args(TruncationName), "error")
        return {"truncation": truncation, "max_length": self.number("max_length")}

    @property
    def file(self) -> tuple[str, bytes]:
        """A file's name and its bytes."""
        name, data = self._fields.get("file_name"), self._fields.get("file")
        if not isinstance(name, str) or not isinstance(data, bytes):
            raise InvalidArgumentError("there is no file; choose one")
        return name, data

    @property
    def masks(self) -> list[list[int]] | None:
        """An attention mask for each text; None: the tokenizer's."""
        count = len(self.texts)
        what = "a list of lists of 0 and 1, one for each text"
        return self._read("masks", list, what, lambda found: _are_positions(found) and len(found) == count)

    def strings(self, name: str, most: int) -> tuple[str, ...]:
        """Returns a list of at least one string, and at most so many."""
        found = self._fields.get(name)
        if not isinstance(found, list) or not found or not all(isinstance(one, str) for one in found):
            raise InvalidArgumentError(f"{name} is not a list of strings; write at least one text")
        if len(found) > most:
            raise InvalidArgumentError(f"{name} has {len(found)} entries, the page takes {most}; remove some")
        return tuple(found)

    def number(self, name: str, least: int = 1, most: int = 1 << 30) -> int | None:
        """Returns a whole number, or None if there is none."""
        return self._read(name, int, f"a whole number from {least} to {most}", lambda found: least <= found <= most)

    def text(self, name: str) -> str | None:
        """Returns a string, or None if there is none."""
        return self._read(name, str, "a string")

    def flag(self, name: str, default: bool) -> bool:
        """Returns whether something is chosen."""
        found = self._read(name, bool, "true or false")
        return default if found is None else found

    def poolings(self, layer_count: int) -> list[Pooling]:
        """Returns the chosen pooling for each layer."""
        strategy: PoolingName = self._choice("pooling", get_args(PoolingName), "mean")
        return each_layer(strategy, layer_count, include_special_tokens=self.flag("special_tokens", True))

    def tokens(self, name: str) -> tuple[Place, Place] | None:
        """Returns two tokens, or None if there are none."""
        what = "a list of two tokens, each a text and a position"
        found = self._read(name, list, what, lambda pair: _are_positions(pair) and list(map(len, pair)) == [2, 2])
        return None if found is None else (tuple(found[0]), tuple(found[1]))

    def _choice(self, name: str, choices: Sequence[str], default: str) -> Any:
        return self._read(name, str, f"one of {', '.join(choices)}", choices.__contains__) or default

    def _read(
        self, name: str, kind: type[Value], what: str, fits: Callable[[Value], bool] = lambda found: True
    ) -> Value | None:
        """Returns a field, or None if there is none."""
        found = self._fields.get(name)
        if found is None or (type(found) is kind and fits(found)):
            return found
        raise InvalidArgumentError(f"{name} is not {what}")


def _are_positions(found: Any) -> bool:
    """Returns whether this is a list of lists of whole numbers that are not negative."""
    return isinstance(found, list) and all(
        isinstance(row, list) and all(isinstance(one, int) and one >= 0 for one in row) for row in found
    )
