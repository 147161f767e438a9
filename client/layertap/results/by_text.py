"""What results of several texts have in common: their number, and each text by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from layertap import _repr


class ByText(_repr.Shown):
    """The result of several texts."""

    __slots__ = ()

    def __len__(self) -> int:
        """The number of texts."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Self]:
        """Yields each text by itself, as views without the padding that others needed."""
        return (self._text(index) for index in range(len(self)))

    def _text(self, index: int) -> Self:
        raise NotImplementedError
