"""Tables of texts in, tables of vectors out: what runs in the processes of a data-parallel framework.

A table keeps its rows and their order. Each output is a column, a FixedSizeList of one vector a text or a List of them;
numbers never become Python objects. A text that fails has nulls there, and its reason in the column `error`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Unpack

from layertap import optional_deps
from layertap._protocol import requests
from layertap._protocol.options import EmbedOptions
from layertap_server.offline.model import EngineOptions, OfflineModel
from layertap_server.offline.pieces import Piece

ERROR: Final = "error"
"""The column with the reason of a text that has no vectors; null: it has."""

_lock: Final = threading.Lock()
_shared: Final[dict[str, Embedder]] = {}


class Embedder:
    """Embeds a column of texts. It is made once in each process and called with one table after the other.

    Attributes:
        schema: The columns that it adds, as an Arrow schema; its metadata has model_id and fingerprint.
    """

    def __init__(
        self,
        *,
        model_id: str = "",
        text_column: str = "text",
        keep: Sequence[str] | None = None,
        fixed_size: bool = True,
        engine: EngineOptions | None = None,
        **options: Unpack[EmbedOptions],
    ) -> None:
        """Loads the model.

        Args:
            model_id: A folder with a checkpoint, or the name of one on the hub. Empty: the embedded model.
            text_column: The column of the texts: strings, or lists of words or of token ids.
            keep: Columns that are carried over. None: all.
            fixed_size: Whether a vector is a FixedSizeList; False: a List, for what knows no other, as Spark.
            engine: How the model is loaded and run: flags of `layertap-server`, such as `{"dtype": "bfloat16"}`.
            options: What is asked of each text: the options of `Client.embed_stream`.

        Raises:
            CheckpointError: if the model cannot be served.
            ConfigError: if an engine option does not suit the model or the machine.
            LayertapError: if an option is at fault.
            ModuleNotFoundError: if pyarrow is missing; `layertap[arrow]` brings it.
        """
        self._pa = optional_deps.load("pyarrow", extra="arrow", purpose="an Embedder")
        self._text_column = text_column
        self._keep = None if keep is None else list(keep)
        self._options = requests.embed_stream(options)
        self._model = OfflineModel(model_id, **(engine or {}))
        columns = self._model.blank(self._options).to_arrow().schema
        if not fixed_size:
            columns = self._pa.schema([field.with_type(self._list(field.type)) for field in columns], columns.metadata)
        self._empty = columns.empty_table()
        self.schema = columns.append(self._pa.field(ERROR, self._pa.string()))

    @classmethod
    def shared(cls, **arguments: Any) -> Embedder:
        """Returns the embedder of this process with these arguments, which is made the first time.

        For frameworks that call a function of yours once for each partition.

        Args:
            arguments: Those of an `Embedder`.
        """
        key = repr(sorted(arguments.items()))
        with _lock:
            if key not in _shared:
                _shared[key] = cls(**arguments)
            return _shared[key]

    def __call__(self, batch: Any) -> Iterator[Any]:
        """Yields a table, piece by piece, with the outputs as more columns.

        Args:
            batch: A `pyarrow.Table`, a `pyarrow.RecordBatch`, or columns by name.

        Raises:
            KeyError: if it has not the columns, or has those that are added.
            LayertapError: if the engine has failed.
        """
        table = self._table(batch)
        for name in (self._text_column, *(self._keep or ())):
            if name not in table.column_names:
                raise KeyError(f"there is no column {name}, there are {', '.join(table.column_names)}")
        texts = table.column(self._text_column).to_pylist()
        if self._keep is not None:
            table = table.select(self._keep)
        if taken := sorted({*table.column_names} & {*self.schema.names}):
            raise KeyError(f"the column {taken[0]} is there already; rename it, or leave it out of keep")
        if not texts:
            yield self._joined(table, self.schema.empty_table())
        start = 0
        for piece in self._model.embed(texts, self._options):
            count = len(piece.errors)
            yield self._joined(table.slice(start, count), self._columns(piece))
            start += count

    def _table(self, batch: Any) -> Any:
        if isinstance(batch, self._pa.RecordBatch):
            return self._pa.Table.from_batches([batch])
        return self._pa.table(dict(batch)) if isinstance(batch, Mapping) else batch

    def _list(self, kind: Any) -> Any:
        """Returns a type with Lists in place of FixedSizeLists."""
        types = self._pa.types
        is_list = types.is_fixed_size_list(kind) or types.is_list(kind)
        return self._pa.list_(self._list(kind.value_type)) if is_list else kind

    def _columns(self, piece: Piece) -> Any:
        """Returns the added columns for each row of a piece."""
        errors = piece.errors
        found = self._empty if piece.embedding is None else piece.embedding.to_arrow()
        if found.schema != self._empty.schema:
            found = found.cast(self._empty.schema)
        if any(error is not None for error in errors):
            places = iter(range(len(errors)))
            rows = [next(places) if error is None else None for error in errors]
            found = found.take(self._pa.array(rows, self._pa.int64()))
        reasons = [None if error is None else f"{error.code.name}: {error.details}" for error in errors]
        return found.append_column(ERROR, self._pa.array(reasons, self._pa.string()))

    def _joined(self, table: Any, columns: Any) -> Any:
        for field, column in zip(columns.schema, columns.columns, strict=True):
            table = table.append_column(field, column)
        return table.replace_schema_metadata({**(table.schema.metadata or {}), **self.schema.metadata})
