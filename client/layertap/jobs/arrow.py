"""Parquet in, Parquet and Arrow IPC out: all that knows pyarrow, and needs the extra `arrow`.

One row a text. A vector is a FixedSizeList, the rows of a text a List of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.parquet as pq

from layertap.jobs import JobError
from layertap.jobs.items import BadItem, Fields, Item, from_fields
from layertap.jobs.readers import Source, check_columns
from layertap.jobs.table import Block, Table
from layertap.results import export

_ROWS: Final = 1024
"""Rows of the input that are read at a time."""

_BUFFER_BYTES: Final = 1 << 20

_TYPES: Final = {"bool": pa.bool_(), "integer": pa.int64(), "long": pa.int64(), "number": pa.float64()}
"""The types of columns that are kept; all others are strings."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ParquetRows(Source):
    """The rows of a Parquet file."""

    path: Path
    fields: Fields

    def __post_init__(self) -> None:
        """Refuses a file that does not have the columns.

        Raises:
            JobError: if it is no Parquet, or a column is missing, there twice or of another type.
        """
        with self._readable():
            schema = pq.read_schema(self.path)
        check_columns(str(self.path), schema.names, self.fields)
        kind = _value_type(schema.field(self.fields.text).type)
        if not _is_string(_value_type(kind.value_type) if _is_list(kind) else kind):
            self._refuse(self.fields.text, kind, "texts are strings, or lists of strings", "--text-field")
        if self.fields.id is not None:
            kind = _value_type(schema.field(self.fields.id).type)
            if not (_is_string(kind) or pa.types.is_integer(kind)):
                self._refuse(self.fields.id, kind, "ids are strings or whole numbers", "--id-field")
        for name in self.fields.keep:
            kind = _value_type(schema.field(name).type)
            if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
                self._refuse(name, kind, "bytes cannot be kept", "--keep")

    def items(self) -> Iterator[Item | BadItem]:
        """Yields all rows in order.

        Raises:
            JobError: if the file is damaged, or a column has a value that Python does not.
        """
        with self._readable(), pq.ParquetFile(self.path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            number = 0
            for batch in file.iter_batches(_ROWS, columns=self.fields.names, use_threads=False):
                columns = {name: self._values(batch, name) for name in self.fields.names}
                for row in range(batch.num_rows):
                    number += 1
                    yield from_fields(number, {name: column[row] for name, column in columns.items()}, self.fields)

    def count(self) -> int | None:
        """Returns how many rows there are."""
        with self._readable():
            rows: int = pq.read_metadata(self.path).num_rows
        return rows

    def stat(self) -> os.stat_result:
        """Returns which file is read."""
        return self.path.stat()

    def _values(self, batch: Any, name: str) -> list[Any]:
        try:
            return _values(batch.column(name))
        except (OverflowError, ValueError) as exc:
            raise JobError(
                f"{self.path}: the column {name} has a value that cannot be read ({exc}); leave it out of --keep"
            ) from exc

    def _refuse(self, name: str, kind: Any, rule: str, flag: str) -> None:
        raise JobError(f"{self.path}: the column {name} is of type {kind}; {rule}; choose another with {flag}")

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as exc:
            if isinstance(exc, OSError) and exc.errno:  # Without one it is Arrow that says what is damaged.
                exc.filename = str(self.path)
                raise
            raise JobError(f"{self.path} cannot be read as Parquet; is it whole?") from exc


def write_parquet(table: Table, file: BinaryIO) -> None:
    """Writes a table as Parquet, a row group a block."""
    tables = (_table(table, block) for block in table.blocks())
    first = next(tables)
    # Vectors hardly ever repeat: neither a dictionary nor a range of values says anything of them.
    flat = [*(label.name for label in table.labels), *(column.name for column in table.columns if not column.row_shape)]
    with pq.ParquetWriter(file, first.schema, use_dictionary=flat, write_statistics=flat) as writer:
        for one in itertools.chain([first], tables):
            writer.write_table(one)


def write_arrow(table: Table, file: BinaryIO) -> None:
    """Writes a table as an Arrow IPC file, a record batch a block."""
    tables = (_table(table, block) for block in table.blocks())
    first = next(tables)
    with pa.ipc.new_file(file, first.schema) as writer:
        for one in itertools.chain([first], tables):
            writer.write_table(one)


def _table(table: Table, block: Block) -> Any:
    columns = [
        export.Column(
            name=column.name,
            values=block.arrays[column.name],
            counts=block.arrays[column.counts] if column.counts else None,
        )
        for column in table.columns
    ]
    found = export.to_arrow(columns, table.metadata)
    for place, label in enumerate(table.labels):
        values = pa.array(block.labels[label.name], _TYPES.get(label.kind, pa.string()))
        found = found.add_column(place, label.name, values)
    return found


def _values(column: Any) -> list[Any]:
    if pa.types.is_date(column.type) or pa.types.is_time(column.type) or pa.types.is_timestamp(column.type):
        column = column.cast(pa.string())  # Python's own have no nanoseconds and no year above 9999.
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:  # Not every writer checks its strings. One that is no UTF-8 makes its own item bad only.
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        values = _decoded(column.cast(_binary(column.type)).to_pylist())
    return values


def _binary(kind: Any) -> Any:
    if _is_list(kind):
        return pa.large_list(_binary(kind.value_type)) if pa.types.is_large_list(kind) else pa.list_(pa.binary())
    return pa.large_binary() if pa.types.is_large_string(kind) else pa.binary()


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(one) for one in value]
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _value_type(kind: Any) -> Any:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_string(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))
