"""Ray Data with the engine in the actors: texts become vectors on any number of machines, and no server is needed.

`embed_dataset` works on a dataset, whose vectors go on to whatever reads it. `embed_shards` works on files: Ray hands
them out, their vectors never pass its object store, and a job that was killed resumes from what is finished. Both need
the extra `ray`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Unpack

from layertap import optional_deps
from layertap._protocol.option_names import check_names
from layertap._protocol.options import EmbedOptions
from layertap.jobs.shards import Shard
from layertap.jobs.tasks import EmbedTask
from layertap_server.offline.embedder import Embedder
from layertap_server.offline.model import EngineOptions
from layertap_server.offline.shards import ShardEmbedder, ShardResult, assign

if TYPE_CHECKING:
    import ray.data

__all__ = ["Embedder", "EngineOptions", "ShardEmbedder", "ShardResult", "embed_dataset", "embed_shards"]

_BATCH_TEXTS: Final = 4096
"""Texts an actor is called with: enough that it seldom waits for the next ones, and little to do again after a crash.

The outputs of a call leave in pieces of some MiB, which Ray puts into blocks as they come, so they may be any size."""

_CALLS_OF_A_GPU: Final = 2
"""Calls of an actor at once: a GPU computes the texts of one while those of the other are read and put away."""


def embed_dataset(
    dataset: ray.data.Dataset,
    *,
    model_id: str = "",
    text_column: str = "text",
    keep: Sequence[str] | None = None,
    actors: int | tuple[int, int] = 1,
    num_gpus: float = 0,
    num_cpus: float | None = None,
    batch_size: int = _BATCH_TEXTS,
    engine: EngineOptions | None = None,
    ray_remote_args: dict[str, Any] | None = None,
    **options: Unpack[EmbedOptions],
) -> ray.data.Dataset:
    """Returns a dataset with the vectors of a column of texts as more columns, and the reasons of bad rows in `error`.

    It is computed as it is read. The order of the rows is that of the dataset if Ray is asked to preserve it.

    Args:
        dataset: The texts.
        model_id: A folder with a checkpoint, which each machine must have, or the name of one on the hub. Empty: the
            embedded model.
        text_column: The column of the texts: strings, or lists of words or of token ids.
        keep: Columns that are carried over. None: all.
        actors: How many processes hold the model, or the least and the most.
        num_gpus: GPUs of each. 0: it computes on the CPU.
        num_cpus: CPUs of each, which on the CPU is also how many cores it computes with. None: 1.
        batch_size: Texts of a call.
        engine: How the model is loaded and run: flags of `layertap-server`, such as `{"dtype": "bfloat16"}`.
        ray_remote_args: More about the actors, as `map_batches` takes it.
        options: What is asked of each text: the options of `Client.embed_stream`.

    Raises:
        InvalidArgumentError: if an option is of a wrong type.
        ModuleNotFoundError: if Ray is missing; `layertap[server,ray]` brings it.
    """
    check_names(options, EmbedOptions)
    found: ray.data.Dataset = dataset.map_batches(
        Embedder,
        fn_constructor_kwargs={
            "model_id": model_id,
            "text_column": text_column,
            "keep": keep,
            "engine": _engine(engine, num_gpus, num_cpus),
            **options,
        },
        batch_format="pyarrow",
        batch_size=batch_size,
        zero_copy_batch=True,
        **_actors(actors, num_gpus, num_cpus, calls=_CALLS_OF_A_GPU if num_gpus else 1),
        **(ray_remote_args or {}),
    )
    return found


def embed_shards(
    paths: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    model_id: str = "",
    text_field: str = "text",
    id_field: str | None = None,
    keep: Sequence[str] = (),
    input_format: str | None = None,
    output_format: str = "parquet",
    overwrite: bool = False,
    actors: int | tuple[int, int] = 1,
    num_gpus: float = 0,
    num_cpus: float | None = None,
    engine: EngineOptions | None = None,
    ray_remote_args: dict[str, Any] | None = None,
    **options: Unpack[EmbedOptions],
) -> list[ShardResult]:
    """Embeds files of texts, each into a file of its own, as `layertap embed` does; returns what came of each.

    Files that are finished are passed over: after a crash of anything, the same call does what is left.

    Args:
        paths: Files, folders, and patterns such as `corpus/**/*.parquet`, which each machine must see.
        output: The folder of the outputs, likewise.
        model_id: As in `embed_dataset`.
        text_field: The field or column of the text, or of a list of its words.
        id_field: The field or column of the id. None: the number of the line or row, from 1.
        keep: Fields or columns that are carried over.
        input_format: The format of the files. None: as their names end.
        output_format: "parquet", "arrow", "npz", "npy" or "safetensors".
        overwrite: Whether files that are finished with other settings, or another input or model, are replaced.
        actors: As in `embed_dataset`, likewise the following.
        num_gpus: GPUs of each.
        num_cpus: CPUs of each.
        engine: How the model is loaded and run.
        ray_remote_args: More about the actors.
        options: What is asked of each text: the options of `Client.embed_stream`, but return_tokens.

    Raises:
        JobError: if there is no file, or two would become the same.
        TypeError: if there is no such option.
        ModuleNotFoundError: if Ray is missing; `layertap[server,ray]` brings it.
    """
    data = optional_deps.load("ray.data", extra="server,ray", purpose="embed_shards()")
    EmbedTask.of(options)
    found = assign(paths, output, output_format=output_format)
    pairs = [{"source": str(one.source.absolute()), "output": str(one.output.absolute())} for one in found]
    results = data.from_items(pairs, override_num_blocks=len(pairs)).map(
        _ShardActor,
        fn_constructor_kwargs={
            "model_id": model_id,
            "text_field": text_field,
            "id_field": id_field,
            "keep": keep,
            "input_format": input_format,
            "overwrite": overwrite,
            "engine": _engine(engine, num_gpus, num_cpus),
            **options,
        },
        **_actors(actors, num_gpus, num_cpus, calls=1),
        **(ray_remote_args or {}),
    )
    rows = sorted(results.take_all(), key=lambda row: str(row["source"]))
    return [ShardResult(**row) for row in rows]


class _ShardActor(ShardEmbedder):
    """A `ShardEmbedder` whose calls take and return a row."""

    def __call__(self, row: dict[str, str]) -> dict[str, Any]:  # type: ignore[override]
        shard = Shard(source=Path(row["source"]), output=Path(row["output"]))
        return dataclasses.asdict(super().__call__(shard))


def _engine(given: EngineOptions | None, num_gpus: float, num_cpus: float | None) -> EngineOptions:
    """Returns how the model is run in an actor: on what Ray has given to it, which the actor cannot see of CPUs."""
    if num_gpus:
        return {"device": "cuda", **(given or {})}
    return {"device": "cpu", "instances": max(1, int(num_cpus or 1)), "instance_threads": 1, **(given or {})}


def _actors(count: int | tuple[int, int], num_gpus: float, num_cpus: float | None, *, calls: int) -> dict[str, Any]:
    """Returns the arguments of a map over a dataset that say which actors it has."""
    strategy = optional_deps.load("ray.data", extra="server,ray", purpose="embed_dataset()").ActorPoolStrategy
    least, most = (count, count) if isinstance(count, int) else count
    several = {"max_concurrent_calls_per_actor": calls, "enable_true_multi_threading": True} if calls > 1 else {}
    compute = strategy(min_size=least, max_size=most, **several)
    return {"compute": compute, "num_cpus": 1 if num_cpus is None else num_cpus} | (
        {"num_gpus": num_gpus} if num_gpus else {}
    )
