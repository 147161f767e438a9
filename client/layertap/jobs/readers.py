"""Where texts come from: arguments, lines of text, lines of JSON; Parquet is in `arrow`.

An item is a text, or words already split, with its number (from 1, in files the line) and its id, which is the number
unless a field says otherwise. What cannot be read is an item too, with its reason, so that a bad line ends nothing.
Sources hold one item at a time.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, Final, Protocol, TypeAlias

MAX_LINE_BYTES: Final = 16 << 20
"""A longer line is a bad item: no text that a server takes needs it, and it would have to be held."""

MAX_ID_CHARACTERS: Final = 1024

_CHUNK_BYTES: Final = 1 << 20

Content: TypeAlias = "str | list[str]"
"""A text, or its words."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """Something to embed.

    Attributes:
        number: Its place in the input, from 1; in files that of its line or row.
        id: What the user calls it.
        content: The text, or its words.
    """

    number: int
    id: int | str
    content: Content


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BadItem:
    """Something that cannot be read or embedded.

    Attributes:
        number: As in `Item`.
        id: As in `Item`; None where even that cannot be read.
        code: The name of a status code.
        reason: What is wrong with it, without the text.
    """

    number: int
    id: int | str | None
    code: str
    reason: str


class Source(Protocol):
    """Items in their order."""

    @property
    def repeatable(self) -> bool:
        """Whether they can be read again from the start."""

    def items(self) -> Iterator[Item | BadItem]:
        """Yields all items in order."""

    def count(self) -> int | None:
        """Returns how many items there are, or None if only reading tells."""


class Arguments:
    """Texts that are there already."""

    repeatable = True

    def __init__(self, texts: Sequence[str]) -> None:
        """Takes the texts."""
        self._texts = texts

    def items(self) -> Iterator[Item | BadItem]:
        """Yields all items in order."""
        return (checked(number, number, text) for number, text in enumerate(self._texts, 1))

    def count(self) -> int | None:
        """Returns how many there are."""
        return len(self._texts)


class Lines:
    """The lines of a file; each is a text, also an empty one."""

    def __init__(self, opened: Callable[[], BinaryIO], *, repeatable: bool) -> None:
        """Takes what opens the file, and whether that can be done again."""
        self.repeatable = repeatable
        self._opened = opened

    def items(self) -> Iterator[Item | BadItem]:
        """Yields all items in order."""
        with contextlib.closing(self._opened()) as file:
            for number, line in enumerate(_lines(file), 1):
                if line is None:
                    yield _bad(number, None, f"the line is longer than {MAX_LINE_BYTES} bytes; shorten it")
                elif (item := self._item(number, line)) is not None:
                    yield item

    def count(self) -> int | None:
        """Returns how many lines there are."""
        if not self.repeatable:
            return None
        count, last = 0, b"\n"
        with contextlib.closing(self._opened()) as file:
            while chunk := file.read(_CHUNK_BYTES):
                count += chunk.count(b"\n")
                last = chunk[-1:]
        return count + (last != b"\n")

    def _item(self, number: int, line: bytes) -> Item | BadItem | None:
        try:
            return checked(number, number, line.decode())
        except UnicodeDecodeError as exc:
            return _bad(number, None, f"the line is not UTF-8 at byte {exc.start}; convert the file")


class JsonLines(Lines):
    """One JSON object a line; empty lines are none."""

    def __init__(
        self, opened: Callable[[], BinaryIO], *, repeatable: bool, text_field: str, id_field: str | None
    ) -> None:
        """Takes, beside what `Lines` takes, which fields hold the text (or the words) and the id."""
        super().__init__(opened, repeatable=repeatable)
        self._text_field = text_field
        self._id_field = id_field

    def _item(self, number: int, line: bytes) -> Item | BadItem | None:
        if not line.strip():
            return None
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            return _bad(number, None, "the line is no JSON; write one object a line, in UTF-8")
        if not isinstance(fields, dict):
            return _bad(number, None, "the line is no JSON object; write one object a line")
        return from_fields(number, fields, text_field=self._text_field, id_field=self._id_field)


def from_fields(number: int, fields: dict[str, Any], *, text_field: str, id_field: str | None) -> Item | BadItem:
    """Returns what the fields of a line or row make."""
    identity = number if id_field is None else fields.get(id_field)
    if isinstance(identity, bool) or not isinstance(identity, (int, str)):
        return _bad(number, None, f"the field {id_field} is missing, or neither a string nor a whole number")
    if text_field not in fields:
        return checked(number, identity, None, f"the field {text_field} is missing; name another with --text-field")
    return checked(
        number, identity, fields[text_field], f"the field {text_field} is neither a string nor a list of them"
    )


def checked(number: int, identity: int | str, content: object, otherwise: str = "") -> Item | BadItem:
    """Returns an item if its id can be kept and its content can be sent.

    Args:
        number: Its number.
        identity: Its id.
        content: What is to be a text or words.
        otherwise: The reason if it is neither.
    """
    try:
        size = len(str(identity).encode())
    except (UnicodeEncodeError, ValueError):
        return _bad(number, None, "the id cannot be written in UTF-8; replace it")
    if size > MAX_ID_CHARACTERS or "\0" in str(identity):
        return _bad(number, None, f"the id has a NUL, or more than {MAX_ID_CHARACTERS} bytes; use a shorter one")
    if isinstance(content, str):
        pieces = [content]
    elif isinstance(content, list) and content and all(isinstance(word, str) for word in content):
        pieces = content
    else:
        return _bad(number, identity, otherwise)
    try:
        for piece in pieces:
            piece.encode()
    except UnicodeEncodeError:
        return _bad(number, identity, "the text has a lone surrogate, which UTF-8 cannot carry; replace it")
    return Item(number=number, id=identity, content=content)


class Digest:
    """Tells whether items are those that were read before: a sum over all that decides what comes out."""

    def __init__(self) -> None:
        """Begins before the first item."""
        self._sum = hashlib.sha256()

    def add(self, item: Item | BadItem) -> None:
        """Takes the next item."""
        content = item.content if isinstance(item, Item) else None
        reason = item.reason if isinstance(item, BadItem) else None
        self._sum.update(json.dumps([item.number, item.id, content, reason]).encode())

    def text(self) -> str:
        """Returns the sum over all items so far, in hex."""
        return self._sum.hexdigest()


def _bad(number: int, identity: int | str | None, reason: str) -> BadItem:
    return BadItem(number=number, id=identity, code="INVALID_ARGUMENT", reason=reason)


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Yields lines without their ends, and None for each that is too long, without holding it."""
    first = True
    while line := file.readline(MAX_LINE_BYTES + 2):
        if first:
            line, first = line.removeprefix(codecs.BOM_UTF8), False
        whole = line.endswith(b"\n")
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        if whole or len(line) <= MAX_LINE_BYTES:
            yield line
            continue
        while (rest := file.readline(_CHUNK_BYTES)) and not rest.endswith(b"\n"):
            pass
        yield None
