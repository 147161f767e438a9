"""Sentences and vectors of a file that the page was given: lines, JSON lines, or Parquet as `layertap embed` writes it.

Read from memory, never stored. `layertap embed` writes no texts unless they are kept (`--keep text`); rows without one
are called by their ids.
"""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any, Final

import numpy.typing as npt

from layertap import optional_deps
from layertap.errors import InvalidArgumentError
from layertap.explore.requests import MAX_SENTENCES
from layertap.jobs.items import is_utf8
from layertap.types import Pooling

_TEXT: Final = "text"
_LABELS: Final = (_TEXT, "title", "ids", "id")
ENCODED: Final = "sentence_embedding"
"""The column of vectors that `layertap encode` writes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Corpus:
    """What a file holds.

    Attributes:
        sentences: A text for each row, or what else it is called.
        has_texts: Whether they are texts, which can be embedded.
        vectors: The matrices of the file by their column. Shape of each: [sentence_count, size].
        fingerprint: The model that the vectors are of; None: there are none, or the file does not say.
    """

    sentences: list[str]
    has_texts: bool = True
    vectors: dict[str, npt.NDArray[Any]] = dataclasses.field(default_factory=dict)
    fingerprint: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Held:
    """The vectors of a list of sentences.

    Attributes:
        name: What the page calls it.
        sentences: The sentences that have vectors.
        matrices: One for each layer, or one in all. Shape of each: [sentence_count, size].
        poolings: What a query is pooled with, one for each matrix; None: as `encode` does.
        column: The column of the file that they come from; None: the page had them embedded.
    """

    name: str
    sentences: tuple[str, ...]
    matrices: list[npt.NDArray[Any]]
    poolings: list[Pooling] | None
    column: str | None = None


def read(name: str, data: bytes) -> Corpus:
    """Returns what is in a file, which is of the kind that its name ends with.

    Raises:
        InvalidArgumentError: if it is of another kind, damaged, empty, or has too many rows.
        ModuleNotFoundError: if it is Parquet and pyarrow is missing.
    """
    ending = name.rpartition(".")[2].lower()
    if ending == "parquet":
        corpus = _parquet(data)
    elif ending in ("txt", "jsonl"):
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as exc:
            raise InvalidArgumentError("the file is not UTF-8; convert it first: iconv -t UTF-8") from exc
        # Not splitlines: texts may have the line separators of Unicode.
        rows = [(n, line.removesuffix("\r")) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        corpus = Corpus(sentences=[row if ending == "txt" else _of_line(n, row) for n, row in rows])
    else:
        raise InvalidArgumentError("the file is none that can be read; choose .txt, .jsonl or .parquet")
    if not corpus.sentences:
        raise InvalidArgumentError("the file has no sentence")
    if len(corpus.sentences) > MAX_SENTENCES:
        raise InvalidArgumentError(
            f"the file has {len(corpus.sentences)} sentences, the page takes {MAX_SENTENCES}; choose a part of it"
        )
    return corpus


def _of_line(number: int, line: str) -> str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise InvalidArgumentError(f"line {number} is not JSON; write one object a line") from exc
    text = found.get(_TEXT) if isinstance(found, dict) else found
    if not isinstance(text, str) or not is_utf8(text):
        raise InvalidArgumentError(f"line {number} has no string as {_TEXT!r}, or one with a lone surrogate")
    return text


def _parquet(data: bytes) -> Corpus:
    pa = optional_deps.load("pyarrow", extra="arrow", purpose="Parquet")
    parquet = optional_deps.load("pyarrow.parquet", extra="arrow", purpose="Parquet")
    try:
        file = parquet.ParquetFile(io.BytesIO(data))
        if file.metadata.num_rows > MAX_SENTENCES:  # Before its rows are unpacked.
            raise InvalidArgumentError(
                f"the file has {file.metadata.num_rows} rows, the page takes {MAX_SENTENCES}; choose a part of it"
            )
        table = file.read()
        named = next((name for name in _LABELS if name in table.column_names), None)
        values = [] if named is None else table.column(named).to_pylist()
        matrices = {name: _matrix(table.column(name).combine_chunks()) for name in table.column_names}
    except (pa.ArrowException, OSError, ValueError, KeyError) as exc:  # KeyError: a column that is there twice.
        raise InvalidArgumentError("the file is no Parquet, or is damaged") from exc
    if named is None:
        raise InvalidArgumentError(f"the file has no column {_TEXT} or ids; write it with layertap embed --keep text")
    sentences = ["" if value is None else str(value) for value in values]
    fingerprint = (table.schema.metadata or {}).get(b"fingerprint")
    return Corpus(
        sentences=sentences,
        has_texts=named == _TEXT,
        vectors={name: matrix for name, matrix in matrices.items() if matrix is not None},
        fingerprint=None if fingerprint is None else fingerprint.decode(),
    )


def _matrix(column: Any) -> npt.NDArray[Any] | None:
    """Returns a column of vectors as a matrix, or None of another column."""
    size = getattr(column.type, "list_size", None)
    if not size or column.null_count:
        return None
    values = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, size) if values.dtype.kind == "f" else None
