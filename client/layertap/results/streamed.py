"""What calls yield one by one: the rows of layers as they arrive, and the result of each text of a stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from layertap import _repr
from layertap.errors import LayertapError
from layertap.results.by_text import ByText
from layertap.results.embedding import Embedding
from layertap.types import FloatArray


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class LayerRows(ByText):
    """The rows of some texts in one layer, as they arrived.

    Attributes:
        layer: The absolute layer.
        texts: The positions of the covered texts in the request.
        rows: One array for each of them. Shape: [token_count, hidden_size]. Those of a layer share blocks of memory,
            of 8 MiB where none is larger: copy the few that are kept for long.
    """

    layer: int
    texts: range
    rows: Sequence[FloatArray]

    def __len__(self) -> int:
        """The number of texts."""
        return len(self.texts)

    def _text(self, index: int) -> LayerRows:
        one = slice(index, index + 1)
        return LayerRows(layer=self.layer, texts=self.texts[one], rows=self.rows[one])

    def _summary(self) -> list[tuple[str, str]]:
        shapes = [list(rows.shape) for rows in self.rows]
        return [("layer", str(self.layer)), ("texts", str(self.texts)), ("rows", " ".join(_repr.first(shapes)))]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class StreamResult(_repr.Shown):
    """The answer to one item of `embed_stream`: an embedding of one text, or an error.

    Attributes:
        index: The position of the item among the inputs, from 0.
        error: Why there is no embedding; None if there is one.
    """

    index: int
    error: LayertapError | None
    _embedding: Embedding | None

    @property
    def embedding(self) -> Embedding:
        """The embedding, with text_count 1.

        Raises:
            LayertapError: if the item has no embedding: its own error.
        """
        if self._embedding is None:
            raise self.error or LayertapError("the item has no embedding")
        return self._embedding

    def _summary(self) -> list[tuple[str, str]]:
        what = ("embedding", repr(self._embedding)) if self.error is None else ("error", repr(self.error))
        return [("index", str(self.index)), what]

    def _repr_html_(self) -> str:
        if self._embedding is not None:
            return self._embedding._repr_html_()
        return _repr.table("StreamResult", self._summary())
