"""Parquet in, Parquet and Arrow IPC out: all that knows pyarrow, and needs the extra `arrow`.

One row a text. A vector is a FixedSizeList, the rows of a text a List of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from layertap.jobs.readers import BadItem, Item, from_fields
from layertap.jobs.refusal import JobError
from layertap.jobs.table import IDS, Block, Table
from layertap.results import export

_ROWS: Final = 1024
"""Rows of the input that are read at a time."""

_BUFFER_BYTES: Final = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ParquetRows:
    """The rows of a Parquet file.

    Attributes:
        path: The file.
        text_field: The column of the texts, strings or lists of words.
        id_field: The column of the ids; None: rows are counted.
    """

    repeatable: ClassVar[bool] = True

    path: Path
    text_field: str
    id_field: str | None

    def items(self) -> Iterator[Item | BadItem]:
        """Yields all rows in order."""
        wanted = [self.text_field, *([] if self.id_field is None else [self.id_field])]
        with self._readable(), pq.ParquetFile(self.path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if missing := [name for name in wanted if name not in names]:
                raise JobError(
                    f"{self.path} has no column {missing[0]} (it has {', '.join(names)}); "
                    "name others with --text-field and --id-field"
                )
            number = 0
            for batch in file.iter_batches(_ROWS, columns=wanted, use_threads=False):
                for fields in batch.to_pylist():
                    number += 1
                    yield from_fields(number, fields, text_field=self.text_field, id_field=self.id_field)

    def count(self) -> int | None:
        """Returns how many rows there are."""
        with self._readable():
            rows: int = pq.read_metadata(self.path).num_rows
        return rows

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except pa.ArrowException as exc:
            raise JobError(f"{self.path} cannot be read as Parquet; see whether it is whole") from exc


def write_parquet(table: Table, file: BinaryIO) -> None:
    """Writes a table as Parquet, a row group a block."""
    blocks = _tables(table)
    first = next(blocks)
    # Vectors hardly ever repeat: neither a dictionary nor a range of values says anything of them.
    flat = [IDS, *(column.name for column in table.columns if not column.row_shape)]
    with pq.ParquetWriter(file, first.schema, use_dictionary=flat, write_statistics=flat) as writer:
        writer.write_table(first)
        for one in blocks:
            writer.write_table(one)


def write_arrow(table: Table, file: BinaryIO) -> None:
    """Writes a table as an Arrow IPC file, a record batch a block."""
    blocks = _tables(table)
    first = next(blocks)
    with pa.ipc.new_file(file, first.schema) as writer:
        writer.write_table(first)
        for one in blocks:
            writer.write_table(one)


def _tables(table: Table) -> Iterator[Any]:
    return (_table(table, block) for block in table.blocks())


def _table(table: Table, block: Block) -> Any:
    ids = export.Column(name=IDS, values=block.ids if isinstance(block.ids[0], str) else np.array(block.ids))
    columns = [
        export.Column(
            name=column.name,
            values=block.arrays[column.name],
            counts=block.arrays[column.counts] if column.counts else None,
        )
        for column in table.columns
    ]
    return export.to_arrow([ids, *columns], table.metadata)
