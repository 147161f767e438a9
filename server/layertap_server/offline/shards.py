"""Files of texts in, files of vectors out: what runs in the processes of a framework that only hands out the files.

Each file is a job as `layertap embed` does it, in parts that a crash does not cost, with the same manifest and to the
same bytes: whatever is finished here is finished there, and the other way around.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Unpack, cast

from layertap._protocol import requests
from layertap._protocol.inputs import InputItem
from layertap._protocol.options import EmbedOptions
from layertap.errors import LayertapError
from layertap.jobs import JobError, shards
from layertap.jobs.items import Fields
from layertap.jobs.job import DEFAULT_PART_ITEMS, Job
from layertap.jobs.readers import format_of, open_source
from layertap.jobs.shards import Shard
from layertap.jobs.tasks import EmbedTask
from layertap.results.streamed import StreamResult
from layertap.types import ModelRef
from layertap_server.offline.model import EngineOptions, OfflineModel
from layertap_server.offline.pieces import LABEL

if TYPE_CHECKING:
    from layertap import Client

_NEVER: Final = 0.0
"""There is no connection to wait for."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShardResult:
    """What came of one file.

    Attributes:
        source: The file.
        output: What it became.
        text_count: Texts in the output.
        bad_count: Texts in its side file.
        was_done: Whether it was finished before.
        error: Why it failed; None: it did not.
        warnings: What else there is to say of it, one line each.
    """

    source: str
    output: str
    text_count: int = 0
    bad_count: int = 0
    was_done: bool = False
    error: str | None = None
    warnings: Sequence[str] = ()


class ShardEmbedder:
    """Embeds files. It is made once in each process and called with one file after the other."""

    def __init__(
        self,
        *,
        model_id: str = "",
        text_field: str = "text",
        id_field: str | None = None,
        keep: Sequence[str] = (),
        input_format: str | None = None,
        overwrite: bool = False,
        part_texts: int = DEFAULT_PART_ITEMS,
        engine: EngineOptions | None = None,
        **options: Unpack[EmbedOptions],
    ) -> None:
        """Loads the model.

        Args:
            model_id: A folder with a checkpoint, or the name of one on the hub. Empty: the embedded model.
            text_field: The field or column of the text, or of a list of its words.
            id_field: The field or column of the id. None: the number of the line or row, from 1.
            keep: Fields or columns that are carried over.
            input_format: The format of the files. None: as their names end.
            overwrite: Whether files that are finished with other settings, or another input or model, are replaced.
            part_texts: The most texts in a part, which is what a crash can cost.
            engine: How the model is loaded and run: flags of `layertap-server`, such as `{"dtype": "bfloat16"}`.
            options: What is asked of each text: the options of `Client.embed_stream`, but return_tokens.

        Raises:
            CheckpointError: if the model cannot be served.
            ConfigError: if an engine option does not suit the model or the machine.
            LayertapError: if an option is at fault.
        """
        self._fields = Fields(text=text_field, id=id_field, keep=tuple(keep))
        self._input_format, self._overwrite, self._part_texts = input_format, overwrite, part_texts
        self._task = EmbedTask.of(options)
        model = OfflineModel(model_id, **(engine or {}))
        model.blank(requests.embed_stream(cast("EmbedOptions", self._task.options)))
        self._client = _LocalClient(model)

    def __call__(self, shard: Shard) -> ShardResult:
        """Does one file, or what is left of it.

        Raises:
            LayertapError: if the engine has failed; what is done is kept.
            OSError: if a file cannot be read or written; what is done is kept.
        """
        result = ShardResult(source=str(shard.source), output=str(shard.output))
        warnings: list[str] = []
        try:
            shards.prepare(shard.output.parent)
            job = Job(
                source=open_source(shard.source, self._input_format or format_of(shard.source), self._fields),
                destination=shard.destination(overwrite=self._overwrite),
                task=self._task,
                fields=self._fields,
                input_format=self._input_format,
                part_items=self._part_texts,
                timeout_s=_NEVER,
                warn=warnings.append,
            )
            # What a job asks of a client is here all that there is.
            outcome = job.run(cast("Client", self._client), shown=False)
        except JobError as exc:
            return dataclasses.replace(result, error=str(exc), warnings=warnings)
        return dataclasses.replace(
            result,
            text_count=outcome.text_count,
            bad_count=outcome.bad_count,
            was_done=outcome.was_done,
            warnings=warnings,
        )


class _LocalClient:
    """A model in this process, as a job asks for one."""

    def __init__(self, model: OfflineModel) -> None:
        self._model = model

    def model_info(self, *, timeout_s: float) -> ModelRef:
        """Returns which model it is."""
        return self._model.ref

    def embed_stream(
        self, inputs: Iterable[InputItem], *, item_timeout_s: float, reconnect_timeout_s: float, **options: Any
    ) -> Iterator[StreamResult]:
        """Yields one result for each input, in their order."""
        index = 0
        for piece in self._model.embed(inputs, requests.embed_stream(cast("EmbedOptions", options))):
            good = iter(piece.embedding or ())
            for error in piece.errors:
                if error is None:
                    yield StreamResult(index=index, error=None, _embedding=next(good))
                else:
                    yield StreamResult(index=index, error=_unnamed(error), _embedding=None)
                index += 1


def _unnamed(error: LayertapError) -> LayertapError:
    """Returns an error without the name of its text, which the side file has beside it."""
    return type(error)(error.details.removeprefix(LABEL).lstrip(": "))


def assign(
    paths: str | Path | Sequence[str | Path], output: str | Path, *, output_format: str = shards.OUTPUTS[0]
) -> list[Shard]:
    """Returns the files of a corpus with what each becomes.

    Args:
        paths: Files, folders, and patterns such as `corpus/**/*.parquet`.
        output: The folder of the outputs.
        output_format: "parquet", "arrow", "npz", "npy" or "safetensors".

    Raises:
        JobError: if there is no file, or two would become the same.
    """
    names = [paths] if isinstance(paths, (str, Path)) else paths
    return shards.assign(shards.find(map(str, names)), Path(output), suffix=output_format)
