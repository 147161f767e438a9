"""The layers that an answer holds, by their numbers: what hidden states and attentions have in common.

Rows are kept *ragged* (texts one after the other, divided by their counts), which is how they are sent and what needs
least memory; the padded arrays that transformers would return are made at their first use.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, cast, overload

from layertap import _repr
from layertap.results import export
from layertap.types import FloatArray, IntArray

if TYPE_CHECKING:
    import torch


class HeldLayers(_repr.Shown):
    """Arrays by layer number. Iterates over the held layers in ascending order, padded; `len` is how many are held."""

    __slots__ = ("_padded", "_ragged", "layer_count", "token_counts")

    _option: ClassVar[str]
    """The option that asks for layers."""
    _first_is_input: ClassVar[bool]
    """Whether layer 0 is what the first encoder block reads."""

    def __init__(self, *, ragged: dict[int, FloatArray], token_counts: IntArray, layer_count: int) -> None:
        self._ragged = ragged
        self._padded: dict[int, FloatArray] = {}
        self.token_counts = token_counts
        self.layer_count = layer_count

    @property
    def layers(self) -> tuple[int, ...]:
        """The held layers, absolute, ascending."""
        return tuple(self._ragged)

    @overload
    def __getitem__(self, layer: int) -> FloatArray: ...
    @overload
    def __getitem__(self, layer: slice) -> tuple[FloatArray, ...]: ...
    def __getitem__(self, layer: int | slice) -> FloatArray | tuple[FloatArray, ...]:
        """Returns one layer, padded, or those of a slice of layer numbers.

        Raises:
            IndexError: if a layer is not held.
        """
        if isinstance(layer, slice):
            return tuple(map(self._whole, range(self.layer_count + self._first_is_input)[layer]))
        return self._whole(layer)

    def __iter__(self) -> Iterator[FloatArray]:
        """Yields the held layers in ascending order, padded."""
        return map(self._whole, self._ragged)

    def __len__(self) -> int:
        """The number of held layers."""
        return len(self._ragged)

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        """Pickles the ragged rows only; padded arrays are made again."""
        _, fields = cast("tuple[None, dict[str, Any]]", super().__getstate__())
        return None, {**fields, "_padded": {}}

    def to_torch(self) -> tuple[torch.Tensor, ...]:
        """Returns the held layers as tensors that share their memory, like the tuple of transformers.

        Shape of each: that of an item. The tensor of a read-only array is a copy.

        Raises:
            ModuleNotFoundError: if torch is missing; `layertap[torch]` brings it.
        """
        return tuple(map(export.to_torch, self))

    def absolute(self, layer: int) -> int:
        """Returns the absolute number of a held layer, of which negative ones count from the model's last.

        Raises:
            IndexError: if the layer is not held.
        """
        absolute = layer + self.layer_count + self._first_is_input if layer < 0 else layer
        if absolute not in self._ragged:
            held = ", ".join(map(str, self._ragged)) or "none"
            raise IndexError(f"layer {layer} is not held (held: {held}); ask for it with {self._option}=[{layer}]")
        return absolute

    @property
    def _row_counts(self) -> IntArray:
        """How many rows each text has. Shape: [text_count]."""
        return self.token_counts

    def _whole(self, layer: int) -> FloatArray:
        """Returns one layer, padded."""
        absolute = self.absolute(layer)
        if absolute not in self._padded:
            self._padded[absolute] = self._pad(absolute)
        return self._padded[absolute]

    def _pad(self, layer: int) -> FloatArray:
        raise NotImplementedError

    def _split(self, layer: int) -> list[FloatArray]:
        """Returns views of one layer, one a text."""
        return export.split(self._ragged[self.absolute(layer)], self._row_counts)

    def _rows_of(self, index: int) -> dict[int, FloatArray]:
        """Returns views of all held layers of one text."""
        start, count = int(self._row_counts[:index].sum()), int(self._row_counts[index])
        return {layer: rows[start : start + count] for layer, rows in self._ragged.items()}
