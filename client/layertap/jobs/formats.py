"""The formats of the output, each written from a table in bounded memory, the same bytes each time.

.npz and .safetensors hold one array a column; rows of tokens and words lie one text after the other, divided by
token_counts and word_counts. .npy holds one matrix and nothing else. .parquet and .arrow hold one row a text; see
`arrow`.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

import numpy as np

from layertap import optional_deps
from layertap.jobs import JobError
from layertap.jobs.columns import IDS, Column
from layertap.jobs.table import Member, Table

Writer: TypeAlias = Callable[[Table, BinaryIO], None]

MATRIX: Final = ".npy"
"""The format that holds one matrix and nothing else."""

_SAFETENSORS_NAMES: Final = {
    **{"<f8": "F64", "<f4": "F32", "<f2": "F16", "<i8": "I64"},
    **{"|u1": "U8", "|i1": "I8", "|b1": "BOOL"},
}


def writer_of(path: Path) -> Writer:
    """Returns what writes a file with this name.

    Raises:
        JobError: if no format has this ending.
        ModuleNotFoundError: if a package that the format needs is missing.
    """
    if path.suffix in (".parquet", ".arrow"):
        optional_deps.load("pyarrow", extra="arrow", purpose=path.suffix)
        from layertap.jobs import arrow

        return arrow.write_parquet if path.suffix == ".parquet" else arrow.write_arrow
    writers: dict[str, Writer] = {".npz": _write_npz, MATRIX: _write_npy, ".safetensors": _write_safetensors}
    if path.suffix not in writers:
        raise JobError(f"{path} has no ending that is known; use .npz, .npy, .safetensors, .parquet or .arrow")
    return writers[path.suffix]


def held(table: Table, *, suffix: str) -> list[Member]:
    """Returns the columns that a format has a place for, of those that were not refused."""
    return [member for member in table.members() if suffix != MATRIX or len(member.shape) == 2]


def check_columns(path: Path, columns: tuple[Column, ...], keep: tuple[str, ...] = ()) -> None:
    """Raises JobError if a format has no place for columns, or a kept field has a name that the output uses itself."""
    names = {column.name for column in columns}
    if path.suffix in (".npz", ".safetensors"):  # See Table.label_members; the last is what safetensors says of itself.
        names |= {name + ending for name in (IDS, *keep) for ending in ("_utf8", "_ends")} | {"__metadata__"}
    if taken := [name for name in keep if name in names]:
        raise JobError(f"--keep {taken[0]} is the name of a column of the output; rename the field in the input")
    matrices = [column.name for column in columns if column.row_shape]
    if path.suffix == MATRIX and (len(matrices) != 1 or any(column.counts for column in columns)):
        raise JobError(
            f"{MATRIX} holds one matrix with a row a text, this is {', '.join(matrices)}; write .npz, or ask for one "
            "pooling"
        )


def _write_npz(table: Table, file: BinaryIO) -> None:
    """Writes arrays as .npz, not compressed, dated 1980."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for member in [*table.label_members(has_strings=True), *table.members()]:
            with archive.open(zipfile.ZipInfo(member.name + ".npy"), "w", force_zip64=True) as entry:
                _write_array(entry, member)


def _write_npy(table: Table, file: BinaryIO) -> None:
    (matrix,) = held(table, suffix=MATRIX)
    _write_array(file, matrix)


def _write_array(file: Any, member: Member) -> None:
    header = {"descr": member.dtype.str, "fortran_order": False, "shape": member.shape}
    np.lib.format.write_array_header_1_0(file, header)
    for buffer in member.buffers():
        file.write(buffer)


def _write_safetensors(table: Table, file: BinaryIO) -> None:
    # Wide values first, so that each array begins at a multiple of the size of its values.
    members = [*table.label_members(has_strings=False), *table.members()]
    members.sort(key=lambda member: -member.dtype.itemsize)
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
