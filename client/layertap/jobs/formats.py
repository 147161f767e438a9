"""The formats of the output, each written from a table in bounded memory, the same bytes each time.

.npz and .safetensors hold one array a column; rows of tokens and words lie one text after the other, divided by
token_counts and word_counts. .npy holds one matrix and nothing else. .parquet and .arrow hold one row a text; see
`arrow`.
"""

from __future__ import annotations

import importlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias

from layertap import optional_deps
from layertap.jobs import npy
from layertap.jobs.npy import Member
from layertap.jobs.parts import Column
from layertap.jobs.refusal import JobError
from layertap.jobs.table import Table

Sink: TypeAlias = Callable[[Table, BinaryIO], None]

MATRIX: Final = ".npy"
"""The format that holds one matrix and nothing else."""

_SAFETENSORS_NAMES: Final = {"<f4": "F32", "<f2": "F16", "<i8": "I64", "|u1": "U8", "|b1": "BOOL"}


def sink_of(path: Path) -> Sink:
    """Returns what writes a file with this name.

    Raises:
        JobError: No format has this ending.
        ModuleNotFoundError: A package that the format needs is missing.
    """
    if path.suffix in (".parquet", ".arrow"):
        optional_deps.load("pyarrow", extra="arrow", purpose=path.suffix)
        arrow = importlib.import_module("layertap.jobs.arrow")
        sink: Sink = arrow.write_parquet if path.suffix == ".parquet" else arrow.write_arrow
        return sink
    sinks: dict[str, Sink] = {".npz": _write_npz, MATRIX: _write_npy, ".safetensors": _write_safetensors}
    if path.suffix not in sinks:
        raise JobError(f"{path} has no ending that is known; use .npz, .npy, .safetensors, .parquet or .arrow")
    return sinks[path.suffix]


def held(table: Table, *, suffix: str) -> list[Member]:
    """Returns the columns that a format has a place for, of those that were not refused."""
    return [member for member in table.members() if suffix != MATRIX or len(member.shape) == 2]


def check_columns(path: Path, columns: tuple[Column, ...]) -> None:
    """Refuses columns that a format has no place for.

    Raises:
        JobError: More or less than one matrix is to go into .npy.
    """
    matrices = [column.name for column in columns if column.row_shape]
    if path.suffix == MATRIX and (len(matrices) != 1 or any(column.counts for column in columns)):
        raise JobError(
            f"{MATRIX} holds one matrix with a row a text, this is {', '.join(matrices)}; write .npz, or ask for one "
            "pooling"
        )


def _write_npz(table: Table, file: BinaryIO) -> None:
    npy.write_npz(file, [table.ids(), *table.members()])


def _write_npy(table: Table, file: BinaryIO) -> None:
    (matrix,) = held(table, suffix=MATRIX)
    npy.write_npy(file, matrix)


def _write_safetensors(table: Table, file: BinaryIO) -> None:
    ids = [table.ids()] if table.ids_are_integers else table.ids_as_bytes()
    # Wide values first, so that each array begins at a multiple of the size of its values.
    members = sorted([*ids, *table.members()], key=lambda member: -member.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": table.metadata}
    end = 0
    for member in members:
        begin, end = end, end + member.byte_count
        header[member.name] = {
            "dtype": _SAFETENSORS_NAMES[member.dtype.str],
            "shape": list(member.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for member in members:
        for buffer in member.buffers():
            file.write(buffer)
