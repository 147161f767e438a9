"""Arrays in the forms of other libraries: torch tensors, Arrow tables, pandas frames.

The memory of values is shared, not copied, wherever the other library can share it. A table has one row a text (of
`Tokens`: one a token) and its columns are named after the attributes. A library is imported when it is first needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from layertap import _repr, optional_deps

if TYPE_CHECKING:
    import pandas
    import pyarrow
    import torch

Array: TypeAlias = "npt.NDArray[Any]"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Column:
    """One column of a table.

    Attributes:
        name: Its name.
        values: One str, list of str or number a row, or one vector a row (Shape: [row_count, size]), or the rows of
            all texts one after the other (Shape: [sum of counts, size]).
        counts: Shape: [row_count]; how many vectors each row has. None: exactly one.
    """

    name: str
    values: Array | Sequence[str] | Sequence[Sequence[str]]
    counts: npt.NDArray[np.int64] | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class TorchEmbedding(_repr.Shown):
    """The arrays of an embedding as torch tensors, under the names of transformers' model outputs.

    Attributes:
        last_hidden_state: Shape: [text_count, length, hidden_size]; None if it was not requested.
        pooler_output: Shape: [text_count, hidden_size]; None if it was not requested.
        hidden_states: The held layers, ascending. Shape of each: [text_count, length, hidden_size].
        attentions: The held layers of attentions, ascending; None if they were not requested. Shape of each:
            [text_count, head_count, length, length].
        pools: One for each requested pooling. Shape: [text_count, pool_size].
        attention_mask: Shape: [text_count, length].
    """

    last_hidden_state: torch.Tensor | None
    pooler_output: torch.Tensor | None
    hidden_states: tuple[torch.Tensor, ...]
    attentions: tuple[torch.Tensor, ...] | None
    pools: tuple[torch.Tensor, ...]
    attention_mask: torch.Tensor

    def _summary(self) -> list[tuple[str, str]]:
        arrays = [("last_hidden_state", self.last_hidden_state), ("pooler_output", self.pooler_output)]
        arrays += [(f"pool_{n}", pool) for n, pool in enumerate(self.pools)]
        shown = [(name, str(list(array.shape))) for name, array in arrays if array is not None]
        return [*shown, ("hidden_states", str(len(self.hidden_states)))]


def as_array(array: Array, dtype: npt.DTypeLike | None, copy: bool | None) -> Array:
    """Returns what numpy's `__array__` protocol requires of an object that holds this array.

    Raises:
        ValueError: if `copy` is False and the dtype is another.
    """
    wanted = array.dtype if dtype is None else np.dtype(dtype)
    if wanted == array.dtype and not copy:
        return array
    if copy is False:
        raise ValueError(f"this is of dtype {array.dtype}, so {wanted} takes a copy; leave copy=False out")
    return array.astype(wanted)


def to_torch(array: Array) -> torch.Tensor:
    """Returns a tensor that shares the array's memory; of a read-only array a copy, since tensors are all writable."""
    from_numpy = optional_deps.load("torch", extra="torch", purpose="to_torch()").from_numpy
    tensor: torch.Tensor = from_numpy(array if array.flags.writeable else array.copy())
    return tensor


def to_arrow(columns: Sequence[Column], metadata: Mapping[str, str]) -> pyarrow.Table:
    """Returns a table whose numbers share the columns' memory.

    Vectors are a FixedSizeList, the rows of a text a List of them.
    """
    pa = optional_deps.load("pyarrow", extra="arrow", purpose="to_arrow()")
    table: pyarrow.Table = pa.Table.from_arrays(
        [_arrow(pa, column) for column in columns], names=[column.name for column in columns]
    )
    return table.replace_schema_metadata(dict(metadata) or None)


def to_pandas(columns: Sequence[Column]) -> pandas.DataFrame:
    """Returns a frame; a vector or the rows of a text are one cell, which is a view of the column's array."""
    pd = optional_deps.load("pandas", extra="pandas", purpose="to_pandas()")
    frame: pandas.DataFrame = pd.DataFrame({column.name: _cells(column) for column in columns})
    return frame


def split(rows: Array, counts: npt.NDArray[np.int64]) -> list[Array]:
    """Returns views of rows that lie one text after the other, one a text."""
    ends = np.cumsum(counts)
    return [rows[end - count : end] for end, count in zip(ends, counts, strict=True)]


def _arrow(pa: Any, column: Column) -> Any:
    values = column.values
    if not isinstance(values, np.ndarray):
        return pa.array(values, pa.string() if all(isinstance(one, str) for one in values) else pa.list_(pa.string()))
    if values.ndim == 1:
        return pa.array(values)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    if column.counts is None:
        return vectors
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(column.counts)]), pa.int32()), vectors)


def _cells(column: Column) -> Any:
    values: Any = column.values
    if getattr(values, "ndim", 0) == 1:
        return values
    parts = values if column.counts is None else split(values, column.counts)
    if all(isinstance(part, str) for part in parts):
        return parts
    cells = np.empty(len(parts), object)
    for n, part in enumerate(parts):
        cells[n] = part
    return cells
