"""Where texts come from: arguments, lines of text, lines of JSON, CSV, and Parquet, which is in `arrow`.

Files are UTF-8, with or without a byte order mark, and may be compressed with gzip. Sources hold one item at a time. A
bad line is a bad item; a file that is something else as a whole is refused once, with how to convert it.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import dataclasses
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final, cast

from layertap import optional_deps
from layertap.errors import counted
from layertap.jobs import JobError
from layertap.jobs.items import BadItem, Fields, Item, bad, checked, fields_there, from_fields

FORMATS: Final = ("txt", "jsonl", "csv", "tsv", "parquet")
"""What files of texts may be, and how their names end."""

COMPRESSED: Final = ".gz"
"""How the name of a file ends that is compressed."""

MAX_LINE_BYTES: Final = 16 << 20
"""A longer line is a bad item: no text that a server takes needs it, and it would have to be held."""

_CHUNK_BYTES: Final = 1 << 20
_DELIMITERS: Final = {"csv": ",", "tsv": "\t"}
_STDIN: Final = 0

_ICONV: Final = "convert it first: iconv -f {0} -t UTF-8 OLD > NEW, or in PowerShell Get-Content OLD | Set-Content NEW"
_FOREIGN: Final = {
    codecs.BOM_UTF32_LE: "UTF-32, not UTF-8; " + _ICONV.format("UTF-32"),
    codecs.BOM_UTF16_LE: "UTF-16, not UTF-8; " + _ICONV.format("UTF-16") + " -Encoding utf8",
    codecs.BOM_UTF16_BE: "UTF-16, not UTF-8; " + _ICONV.format("UTF-16") + " -Encoding utf8",
    b"\x1f\x8b": "compressed with gzip; name the file with the ending .gz, or unpack it: zcat",
    b"PAR1": "Parquet; name the file, with the ending .parquet or --input-format parquet",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"(\xb5/\xfd": "compressed with zstd; unpack it first: zstdcat",
}
"""What a file begins with that is no lines of UTF-8, and what to do."""


class UnknownFormatError(JobError):
    """The name of a file says no format that can be read."""


def format_of(path: Path) -> str:
    """Returns the format that the name of a file says, or raises UnknownFormatError."""
    ending = (path.with_suffix("") if path.suffix == COMPRESSED else path).suffix.removeprefix(".")
    if ending not in FORMATS or (ending == "parquet" and path.suffix == COMPRESSED):
        raise UnknownFormatError(
            f"{path} is of no format that can be read; use .txt, .jsonl, .csv, .tsv (each also with .gz) or .parquet, "
            "or say which it is with --input-format"
        )
    return ending


def open_source(path: Path | None, kind: str, fields: Fields) -> Source:
    """Returns what reads a file of one of FORMATS, or stdin if there is none.

    Raises:
        JobError: if a Parquet file does not have the columns, or stdin is said to be one.
        ModuleNotFoundError: if Parquet needs a package that is missing.
    """
    if kind == "txt":
        return Lines(path=path)
    if kind == "jsonl":
        return JsonLines(path=path, fields=fields)
    if kind in _DELIMITERS:
        return Csv(path=path, fields=fields, delimiter=_DELIMITERS[kind])
    if path is None:
        raise JobError("Parquet cannot be read from a pipe; name the file")
    optional_deps.load("pyarrow", extra="arrow", purpose="Parquet")
    from layertap.jobs import arrow

    return arrow.ParquetRows(path=path, fields=fields)


class Source:
    """Items in their order."""

    @property
    def repeatable(self) -> bool:
        """Whether they can be read again from the start."""
        return True

    def items(self) -> Iterator[Item | BadItem]:
        """Yields all items in order."""
        raise NotImplementedError

    def count(self) -> int | None:
        """Returns how many items there are, or None if only reading would tell."""
        return None

    def stat(self) -> os.stat_result | None:
        """Returns which file is read; None: no file."""
        return None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Arguments(Source):
    """Texts of the command line."""

    texts: Sequence[str]

    def items(self) -> Iterator[Item | BadItem]:
        """Yields all items in order."""
        return (checked(number, number, text) for number, text in enumerate(self.texts, 1))

    def count(self) -> int | None:
        """Returns how many there are."""
        return len(self.texts)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Lines(Source):
    """The lines of a file, or of stdin if there is none; each is a text, also an empty one."""

    path: Path | None

    @property
    def name(self) -> str:
        """What messages call it."""
        return "stdin" if self.path is None else str(self.path)

    @property
    def repeatable(self) -> bool:
        """Whether it can be read again: a file can, a pipe cannot."""
        return self.path is not None and self.path.is_file()

    def items(self) -> Iterator[Item | BadItem]:
        """Yields all items in order.

        Raises:
            JobError: if the file is no UTF-8 at all, or is damaged.
        """
        with self._open() as file:
            for number, line in enumerate(self._lines(file), 1):
                if not line.endswith(b"\n") and len(line) > MAX_LINE_BYTES:
                    yield bad(number, None, f"the line is longer than {MAX_LINE_BYTES} bytes; shorten it")
                elif (item := self._item(number, line.removesuffix(b"\n").removesuffix(b"\r"))) is not None:
                    yield item

    def count(self) -> int | None:
        """Returns how many lines there are; None of what cannot be read twice, or would have to be unpacked."""
        if not self.repeatable or self._is_compressed:
            return None
        count, last = 0, b"\n"
        with self._open() as file:
            while chunk := file.read(_CHUNK_BYTES):
                count += chunk.count(b"\n")
                last = chunk[-1:]
        return count + (last != b"\n")

    def stat(self) -> os.stat_result | None:
        """Returns which file is read."""
        return os.fstat(_STDIN) if self.path is None else self.path.stat()

    def _item(self, number: int, line: bytes) -> Item | BadItem | None:
        try:
            return checked(number, number, line.decode())
        except UnicodeDecodeError as exc:
            return bad(number, None, f"the line is not UTF-8 at byte {exc.start}; convert the file")

    @property
    def _is_compressed(self) -> bool:
        return self.path is not None and self.path.suffix == COMPRESSED

    @contextlib.contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        with contextlib.ExitStack() as stack:
            if self.path is None:
                # A reader of its own: a thread that still waits in sys.stdin would not let the interpreter end.
                file: BinaryIO = stack.enter_context(open(_STDIN, "rb", closefd=False))
            elif self._is_compressed:
                file = cast("BinaryIO", stack.enter_context(gzip.open(self.path, "rb")))
            else:
                file = stack.enter_context(self.path.open("rb"))
            try:
                yield file
            except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
                raise JobError(f"{self.name} cannot be unpacked as gzip; is it whole? (gzip -t tells)") from exc
            except OSError as exc:
                exc.filename = self.name
                raise

    def _lines(self, file: BinaryIO) -> Iterator[bytes]:
        """Yields lines with their ends; of one that is too long only the beginning, without its end."""
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 2):
            number += 1
            if number == 1:
                if why := next((why for magic, why in _FOREIGN.items() if line.startswith(magic)), ""):
                    raise JobError(f"{self.name} is {why}")
                line = line.removeprefix(codecs.BOM_UTF8)
            if number <= 2 and line.count(0) * 3 > len(line) > 1:
                raise JobError(f"{self.name} is {_FOREIGN[codecs.BOM_UTF16_LE]}")
            yield line
            if not line.endswith(b"\n") and len(line) > MAX_LINE_BYTES:
                while (rest := file.readline(_CHUNK_BYTES)) and not rest.endswith(b"\n"):
                    pass


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JsonLines(Lines):
    """One JSON object a line; empty lines are no items."""

    fields: Fields

    def _item(self, number: int, line: bytes) -> Item | BadItem | None:
        if not line.strip():
            return None
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            return bad(number, None, "the line is not JSON; write one object a line, in UTF-8")
        if not isinstance(fields, dict):
            return bad(number, None, "the line is not a JSON object; write one object a line")
        return from_fields(number, fields, self.fields)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Csv(Lines):
    """The rows of a CSV file below its first, which names the columns; a value in quotes may span lines."""

    fields: Fields
    delimiter: str

    def items(self) -> Iterator[Item | BadItem]:
        """Yields all rows in order; the first below the names is number 1.

        Raises:
            JobError: if a column is missing, or the file is no UTF-8 at all, damaged or does not begin with a row.
        """
        csv.field_size_limit(MAX_LINE_BYTES)
        with self._open() as file:
            rows = self._rows(file)
            names = next(rows, None)
            if isinstance(names, csv.Error):
                raise JobError(f"{self.name} does not begin with the names of columns: {names}; is a quote missing?")
            if names is None:
                return
            check_columns(self.name, names, self.fields)
            for number, row in enumerate(rows, 1):
                if isinstance(row, csv.Error):
                    yield bad(number, None, f"the row is not CSV: {row}; is a quote missing?")
                elif any(row[len(names) :]):
                    reason = f"the row has {counted(len(row), 'value')}, the header {counted(len(names), 'column')}"
                    yield bad(number, None, f"{reason}; put a value that has a {self.delimiter!r} in quotes")
                else:
                    yield from_fields(number, dict(zip(names, row, strict=False)), self.fields)

    def count(self) -> int | None:
        """Returns None: rows are not lines."""
        return None

    def _rows(self, file: BinaryIO) -> Iterator[list[str] | csv.Error]:
        """Yields all rows but empty ones, or in place of one what is wrong with it."""
        # What is no UTF-8 becomes surrogates, which make the one item bad.
        lines = (line.decode("utf-8", "surrogateescape") for line in self._lines(file))
        # Strict, or all between two stray quotes becomes one text.
        rows = csv.reader(lines, delimiter=self.delimiter, strict=True)
        while True:
            try:
                row = next(rows, None)
            except csv.Error as exc:
                yield exc
                continue
            if row is None:
                return
            if row:
                yield row


def check_columns(name: str, names: Sequence[str], wanted: Fields) -> None:
    """Raises JobError unless a file has each column that is wanted once."""
    for column in wanted.names:
        if (count := names.count(column)) > 1:
            raise JobError(f"{name} has {count} columns {column}; rename all but one of them")
        if not count:
            raise JobError(
                f"{name} has no column {column}; {fields_there(names)}; choose with --text-field, --id-field and --keep"
            )
