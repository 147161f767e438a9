"""Ray Data with the engine in the actors: a dataset of texts becomes one with vectors, on any number of machines.

Each actor holds the model; texts and vectors stay on its machine, and no server is needed. It needs the extra `ray`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Unpack

from layertap import optional_deps
from layertap._protocol.options import EmbedOptions, check_names
from layertap_server.offline.embedder import Embedder
from layertap_server.offline.model import EngineOptions

if TYPE_CHECKING:
    import ray.data

__all__ = ["Embedder", "EngineOptions", "embed_dataset"]

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
    data = optional_deps.load("ray.data", extra="server,ray", purpose="embed_dataset()")
    least, most = (actors, actors) if isinstance(actors, int) else actors
    calls = _CALLS_OF_A_GPU if num_gpus else 1
    resources: dict[str, Any] = {"num_gpus": num_gpus} if num_gpus else {}
    cores = max(1, int(num_cpus or 1))
    place: EngineOptions = {"device": "cpu", "instances": cores, "instance_threads": 1}
    if num_gpus:
        place = {"device": "cuda"}
    found: ray.data.Dataset = dataset.map_batches(
        Embedder,
        fn_constructor_kwargs={
            "model_id": model_id,
            "text_column": text_column,
            "keep": keep,
            "engine": {**place, **(engine or {})},
            **options,
        },
        batch_format="pyarrow",
        batch_size=batch_size,
        zero_copy_batch=True,
        compute=data.ActorPoolStrategy(
            min_size=least,
            max_size=most,
            max_concurrent_calls_per_actor=calls,
            enable_true_multi_threading=calls > 1,
        ),
        num_cpus=1 if num_cpus is None else num_cpus,
        **resources,
        **(ray_remote_args or {}),
    )
    return found
