"""How results show themselves: shapes, layers and first tokens in a line or a small table, never a page of numbers.

Pure. Whatever enters HTML is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np

from layertap.errors import printable

_TOKENS_SHOWN: Final = 12
_TEXTS_SHOWN: Final = 3
_IDS_SHOWN: Final = 16


class Shown:
    """What shows itself by its summary: in one line as its `repr`, in a small table in a notebook."""

    __slots__ = ()

    def _summary(self) -> Iterable[tuple[str, str]]:
        """Returns what is shown, each part with its name."""
        raise NotImplementedError

    def __repr__(self) -> str:
        """Shapes, never a page of numbers."""
        return line(type(self).__name__, self._summary())

    def _repr_html_(self) -> str:
        return table(type(self).__name__, self._summary())


def array(shape: Sequence[int], dtype: object) -> str:
    """Returns an array's dtype and shape, such as "float32 [2, 5, 384]"."""
    return f"{dtype} {list(shape)}"


def brief(values: object) -> str:
    """Returns a few numbers as they are, and of more their dtype and shape."""
    if values is None:
        return "None"
    try:
        found = np.asarray(values)
    except ValueError:
        return "lists of different lengths"
    return str(found.tolist()) if found.size <= _IDS_SHOWN else array(found.shape, found.dtype)


def layers(numbers: Sequence[int]) -> str:
    """Returns layer numbers, such as "0…6" or "0,5,6"."""
    if len(numbers) > 2 and tuple(numbers) == tuple(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}…{numbers[-1]}"
    return ",".join(map(str, numbers))


def first(items: Sequence[Any]) -> list[str]:
    """Returns the first items, and an ellipsis if there are more."""
    return [*map(str, items[:_TOKENS_SHOWN]), *(["…"] if len(items) > _TOKENS_SHOWN else [])]


def line(name: str, parts: Iterable[tuple[str, str]]) -> str:
    """Returns what `repr` gives: a type and its parts."""
    return printable(f"{name}({', '.join(f'{part}={shown}' for part, shown in parts)})")


def table(title: str, rows: Iterable[tuple[str, str | Sequence[object]]]) -> str:
    """Returns an HTML table: a caption, then in each row a name and its cell or cells."""
    left = 'style="text-align:left"'
    lines = [f"<table><caption {left}>{html.escape(title)}</caption>"]
    for name, shown in rows:
        cells = [shown] if isinstance(shown, str) else shown
        row = "".join(f"<td {left}>{html.escape(str(cell))}</td>" for cell in cells)
        lines.append(f"<tr><th {left}>{html.escape(name)}</th>{row}</tr>")
    return "\n".join([*lines, "</table>"])


def token_rows(texts: Sequence[Sequence[str]], ids: Sequence[Sequence[int]]) -> Iterable[tuple[str, Sequence[object]]]:
    """Yields table rows with the first tokens of the first texts, and their ids below them."""
    for n, (tokens, numbers) in enumerate(zip(texts[:_TEXTS_SHOWN], ids, strict=False)):
        yield f"tokens[{n}]", first(tokens)
        yield f"input_ids[{n}]", first(list(numbers[: len(tokens)]))
    if len(texts) > _TEXTS_SHOWN:
        yield f"… {len(texts) - _TEXTS_SHOWN} more", []
