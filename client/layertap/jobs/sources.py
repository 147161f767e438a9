"""Files of texts by their names: which format a file is of, and what reads it."""

from __future__ import annotations

import importlib
from pathlib import Path

from layertap import optional_deps
from layertap.jobs import JobError
from layertap.jobs.items import Fields
from layertap.jobs.readers import COMPRESSED, FORMATS, Csv, JsonLines, Lines, Source


class UnknownFormatError(JobError):
    """The name of a file says no format that can be read."""


def format_of(path: Path) -> str:
    """Returns the format that the name of a file says.

    Raises:
        UnknownFormatError: if it says none that can be read.
    """
    ending = (path.with_suffix("") if path.suffix == COMPRESSED else path).suffix.removeprefix(".")
    if ending not in FORMATS or (ending == "parquet" and path.suffix == COMPRESSED):
        raise UnknownFormatError(
            f"{path} is of no format that can be read; use .txt, .jsonl, .csv, .tsv (each also with .gz) or .parquet, "
            "or say which it is with --input-format"
        )
    return ending


def open_source(path: Path | None, kind: str, fields: Fields) -> Source:
    """Returns what reads a file, or stdin, which cannot be Parquet, if there is none.

    Raises:
        JobError: if a Parquet file does not have the columns.
        ModuleNotFoundError: if Parquet needs a package that is missing.
    """
    if kind == "txt":
        return Lines(path=path)
    if kind == "jsonl":
        return JsonLines(path=path, fields=fields)
    if kind in ("csv", "tsv"):
        return Csv(path=path, fields=fields, delimiter="," if kind == "csv" else "\t")
    optional_deps.load("pyarrow", extra="arrow", purpose="Parquet")
    rows: Source = importlib.import_module("layertap.jobs.arrow").ParquetRows(path=path, fields=fields)
    return rows
