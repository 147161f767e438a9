"""Texts as tokens, in rectangular arrays with the names of transformers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from layertap import _repr
from layertap.results import export
from layertap.results.by_text import ByText
from layertap.types import BoolArray, IntArray

if TYPE_CHECKING:
    import pandas
    import pyarrow

_NUMBERS: Final = ("input_ids", "attention_mask", "token_type_ids", "special_tokens_mask", "word_ids")
"""What there is one number of for each token."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Tokens(ByText):
    """Texts as tokens, rectangular. `length` is that of the longest text, or `pad_to` if that is more.

    A `Tokens` can be embedded. Padding that `pad_to` requested counts as rows of its text and is
    computed; padding that is there only to make the arrays rectangular is not.

    Attributes:
        tokens: The pieces of each text, padding included up to its token_counts, as transformers' `tokenize` and
            `tokens()` have them. An unknown piece may be spelt as in the text, and a special token with the spaces
            that it takes, such as " <mask>": compare `input_ids`.
        input_ids: Shape: [text_count, length].
        attention_mask: Shape: [text_count, length]; 1 for tokens, 0 for padding.
        token_type_ids: Shape: [text_count, length].
        special_tokens_mask: Shape: [text_count, length]; 1 for special tokens and padding.
        word_ids: Shape: [text_count, length]; -1 for special tokens and padding.
        offset_mapping: Shape: [text_count, length, 2]; start and end in Unicode code points.
        token_counts: Shape: [text_count]; how many positions of each text are to be embedded.
        truncated: Shape: [text_count]; whether tokens were cut.
        request_id: The name of the (last) call in the server's log; None: the server did not say.
    """

    tokens: list[list[str]]
    input_ids: IntArray
    attention_mask: IntArray
    token_type_ids: IntArray
    special_tokens_mask: IntArray
    word_ids: IntArray
    offset_mapping: IntArray
    token_counts: IntArray
    truncated: BoolArray
    request_id: str | None = None

    def __len__(self) -> int:
        """The number of texts."""
        return len(self.token_counts)

    def _text(self, index: int) -> Tokens:
        one, length = slice(index, index + 1), slice(int(self.token_counts[index]))
        by_text: dict[str, Any] = {name: getattr(self, name)[one] for name in ("tokens", "token_counts", "truncated")}
        by_token = {name: getattr(self, name)[one, length] for name in (*_NUMBERS, "offset_mapping")}
        return dataclasses.replace(self, **by_text, **by_token)

    def _summary(self) -> list[tuple[str, str]]:
        """Returns the shape in words, and the first tokens."""
        tokens = " ".join(_repr.first(self.tokens[0])) if self.tokens else ""
        text_count, length = self.input_ids.shape
        return [("text_count", str(text_count)), ("length", str(length)), ("tokens", repr(tokens))]

    def _repr_html_(self) -> str:
        text_count, length = self.input_ids.shape
        rows = _repr.token_rows(self.tokens, self.input_ids.tolist())
        return _repr.table(f"Tokens: text_count={text_count}, length={length}", rows)

    def to_arrow(self) -> pyarrow.Table:
        """Returns an Arrow table with one row a token; see `to_pandas`.

        Raises:
            ModuleNotFoundError: if pyarrow is missing; `layertap[arrow]` brings it.
        """
        return export.to_arrow(self._columns(), {})

    def to_pandas(self) -> pandas.DataFrame:
        """Returns a frame with one row a token, padding that counts as rows of its text included.

        Columns: text (its position), tokens, input_ids, attention_mask, token_type_ids, special_tokens_mask, word_ids,
        and start and end, which are offset_mapping's.

        Raises:
            ModuleNotFoundError: if pandas is missing; `layertap[pandas]` brings it.
        """
        return export.to_pandas(self._columns())

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """Gives the table of `to_arrow` to any library that reads Arrow's PyCapsule interface."""
        return self.to_arrow().__arrow_c_stream__(requested_schema)

    def _columns(self) -> list[export.Column]:
        inside = np.arange(self.input_ids.shape[1]) < self.token_counts[:, None]
        offsets = self.offset_mapping[inside]
        return [
            export.Column(name="text", values=np.repeat(np.arange(len(self)), self.token_counts)),
            export.Column(name="tokens", values=[token for text in self.tokens for token in text]),
            *(export.Column(name=name, values=getattr(self, name)[inside]) for name in _NUMBERS),
            export.Column(name="start", values=offsets[:, 0]),
            export.Column(name="end", values=offsets[:, 1]),
        ]
