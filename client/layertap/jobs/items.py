"""What a corpus consists of: texts, or words already split, each with its number, its id and fields to keep.

Pure. The number counts from 1 (in files of lines it is the line's); the id is the number unless a field is named for
it. What cannot be read is an item too, with its reason, so that a bad line ends nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

MAX_ID_BYTES: Final = 1024

_FIELDS_NAMED: Final = 8
_FIELD_NAME_CHARACTERS: Final = 40

Content: TypeAlias = "str | list[str]"
"""A text, or its words."""

Value: TypeAlias = "bool | int | float | str | None"
"""What is kept of a field."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """Which fields or columns of a corpus mean what.

    Attributes:
        text: The field of the text, or of the list of its words.
        id: The field of the id; None: items are numbered.
        keep: Fields that are carried to the output.
    """

    text: str = "text"
    id: str | None = None
    keep: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """All of them, each once."""
        return list(dict.fromkeys([self.text, *([] if self.id is None else [self.id]), *self.keep]))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """Something to embed.

    Attributes:
        number: Its place in the input, from 1; in files of lines that of its line.
        id: What the user calls it.
        content: The text, or its words.
        kept: The values of the fields to keep, in the order of `Fields.keep`.
    """

    number: int
    id: int | str
    content: Content
    kept: tuple[Value, ...] = ()


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


def from_fields(number: int, fields: Mapping[str, Any], wanted: Fields) -> Item | BadItem:
    """Returns the item that the fields of a line or row describe."""
    identity = number if wanted.id is None else fields.get(wanted.id)
    if isinstance(identity, bool) or not isinstance(identity, (int, str)):
        return bad(number, None, f"the field {wanted.id} is missing, or neither a string nor a whole number")
    if wanted.text not in fields:
        reason = f"the field {wanted.text} is missing; {fields_there(fields)}; name another with --text-field"
        return checked(number, identity, None, reason)
    kept = tuple(_value(fields.get(name)) for name in wanted.keep)
    for name, value in zip(wanted.keep, kept, strict=True):
        if isinstance(value, str) and ("\0" in value or not is_utf8(value)):
            return bad(number, identity, f"the field {name} has a NUL or is not valid UTF-8, so it cannot be kept")
    text = fields[wanted.text]
    reason = f"the field {wanted.text} is {'null, ' if text is None else ''}neither a string nor a list of strings"
    return checked(number, identity, text, reason, kept)


def checked(
    number: int, identity: int | str, content: object, otherwise: str = "", kept: tuple[Value, ...] = ()
) -> Item | BadItem:
    """Returns an item if its id can be stored and its content is a text or words; `otherwise` is why it is neither."""
    try:
        size = len(str(identity).encode())
    except (UnicodeEncodeError, ValueError):
        return bad(number, None, "the id cannot be written in UTF-8; replace it")
    if size > MAX_ID_BYTES or "\0" in str(identity):
        return bad(number, None, f"the id has a NUL, or more than {MAX_ID_BYTES} bytes; use a shorter one")
    if isinstance(content, str):
        pieces = [content]
    elif isinstance(content, list) and content and all(isinstance(word, str) for word in content):
        pieces = content
    else:
        return bad(number, identity, otherwise)
    if not all(map(is_utf8, pieces)):
        return bad(number, identity, "the text is not valid UTF-8, or has a lone surrogate; convert or replace it")
    return Item(number=number, id=identity, content=content, kept=kept)


def bad(number: int, identity: int | str | None, reason: str) -> BadItem:
    """Returns an item that cannot be read."""
    return BadItem(number=number, id=identity, code="INVALID_ARGUMENT", reason=reason)


def fields_there(names: Mapping[str, Any] | Sequence[str]) -> str:
    """Returns a phrase that names the fields or columns that are there, the first few of them."""
    shown = [name if len(name) <= _FIELD_NAME_CHARACTERS else name[:_FIELD_NAME_CHARACTERS] + "…" for name in names]
    more = [f"and {len(shown) - _FIELDS_NAMED} more"] if len(shown) > _FIELDS_NAMED else []
    return "there is no field" if not shown else "there are " + ", ".join([*shown[:_FIELDS_NAMED], *more])


def is_utf8(text: str) -> bool:
    """Returns whether a text can be encoded: it has no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_line_of_bad_item(line: bytes) -> bool:
    """Returns whether a line is one of a side file."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.keys() == {field.name for field in dataclasses.fields(BadItem)}


def json_line(value: object) -> str:
    """Returns JSON in one line that is safe on a terminal: what does not print is escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


class Digest:
    """A sum over items, which tells whether they are those that were read before."""

    def __init__(self) -> None:
        self._sum = hashlib.sha256()

    def add(self, item: Item | BadItem) -> None:
        """Adds the next item, with all that decides the output."""
        content = item.content if isinstance(item, Item) else None
        reason = item.reason if isinstance(item, BadItem) else None
        kept = item.kept if isinstance(item, Item) else ()
        self._sum.update(json.dumps([item.number, item.id, content, reason, kept]).encode())

    def text(self) -> str:
        """Returns the sum over all items so far, in hex."""
        return self._sum.hexdigest()


def _value(value: object) -> Value:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (list, dict)) else str(value)
