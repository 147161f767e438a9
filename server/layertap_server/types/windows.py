"""How a long text is divided into windows, from counts alone: which tokens each window has, and whose rows it gives.

The windows are those that transformers' tokenizers make with `return_overflowing_tokens` and a stride. Of a token that
lies in several, the row is taken from the window in which the nearer edge is farthest from it, of two equally good ones
from the earlier. Each window follows from its index alone, so a text of any length costs nothing before it is computed.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Windowing:
    """How long texts run as windows.

    Attributes:
        stride: Tokens that two windows have in common, special tokens not counted.
        max_count: The most windows of one text.
    """

    stride: int
    max_count: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """One window of a text. Token k of the window is token start + k of the text, for all rows that it gives.

    Attributes:
        index: Which of the windows of its text.
        start: See above; also its first token that is not special, counted among such tokens of the text.
        stop: The one past its last, likewise.
        first_row: The first token of the text whose row it gives.
        row_count: How many it gives; they lie one after the other.
    """

    index: int
    start: int
    stop: int
    first_row: int
    row_count: int

    @property
    def kept(self) -> range:
        """The rows that it gives, counted in the window."""
        first = self.first_row - self.start
        return range(first, first + self.row_count)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """The windows of one text that does not fit one.

    Attributes:
        token_count: Tokens of the text, special tokens once.
        max_length: The most tokens of a window, special tokens counted.
        stride: Tokens that two windows have in common, special tokens not counted.
        prefix_count: Special tokens before the others.
        suffix_count: Special tokens after the others.
    """

    token_count: int
    max_length: int
    stride: int
    prefix_count: int
    suffix_count: int

    @property
    def count(self) -> int:
        """How many windows there are."""
        return 1 + -(-(self._content_count - self._size) // self._step)

    @property
    def computed_token_count(self) -> int:
        """The tokens of all windows together."""
        return self._content_count + (self.count - 1) * self.stride + self.count * self._special_count

    def __getitem__(self, index: int) -> Window:
        """Returns one of them."""
        first = 0 if index == 0 else self.prefix_count + self._last_kept(index - 1) + 1
        end = self.token_count if index == self.count - 1 else self.prefix_count + self._last_kept(index) + 1
        start, stop = self._content(index)
        return Window(index=index, start=start, stop=stop, first_row=first, row_count=end - first)

    @property
    def _special_count(self) -> int:
        return self.prefix_count + self.suffix_count

    @property
    def _content_count(self) -> int:
        return self.token_count - self._special_count

    @property
    def _size(self) -> int:
        """Tokens of a window without special tokens."""
        return self.max_length - self._special_count

    @property
    def _step(self) -> int:
        return self._size - self.stride

    def _content(self, index: int) -> tuple[int, int]:
        """Returns where the tokens of a window start and end among those that are not special."""
        start = index * self._step
        return start, min(start + self._size, self._content_count)

    def _last_kept(self, index: int) -> int:
        """Returns the last token, among those that are not special, that is nearer to this window's middle."""
        return (self._content(index)[1] - 1 + self._content(index + 1)[0]) // 2
