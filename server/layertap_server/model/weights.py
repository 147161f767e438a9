"""Whether the tensors of safetensors files are those of the model, by their headers alone. No numbers are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

import safetensors

from layertap_server.model.architectures import Architecture
from layertap_server.model.files import CheckpointError, check_file, read_json, reason_of, shortened
from layertap_server.model.settings import ModelSettings

INDEX: Final = "model.safetensors.index.json"

FLOATS: Final = ("F64", "F32", "F16", "BF16")
"""The formats of weights that are read."""
_LISTED_LENGTH: Final = 300
_BUFFERS: Final = ("embeddings.position_ids", "embeddings.token_type_ids")
"""What old versions of transformers saved though it is no weight."""


def find_weights(folder: Path) -> tuple[Path, ...]:
    """Returns the safetensors files of a folder.

    Raises:
        CheckpointError: if there are none, or the index names what is not in the folder.
    """
    if (folder / "model.safetensors").is_file():
        return (folder / "model.safetensors",)
    if (folder / INDEX).exists():
        return _shards(folder)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.ckpt")):
        raise CheckpointError(
            "the model has only pickled weights, which can run code and are never opened; name a revision that has "
            "safetensors with --revision, or convert them (the guide's page Models has the lines)"
        )
    raise CheckpointError(f"the model folder {folder.name!r} has no model.safetensors; fetch the whole model")


def _shards(folder: Path) -> tuple[Path, ...]:
    index = read_json(folder / INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{INDEX} has no weight_map of file names; fetch the model again")
    files = sorted(set(names.values()))
    for name in files:
        if len(PurePosixPath(name).parts) != 1 or name == ".." or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{INDEX} names {name!r:.80}, which is not a safetensors file of the model folder")
    missing = [name for name in files if not (folder / name).is_file()]
    if missing or not files:
        listed = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        raise CheckpointError(f"the model lacks {listed or 'all its shards'}; fetch it again")
    return tuple(folder / name for name in files)


def check_weights(files: Sequence[Path], settings: ModelSettings, *, given: Mapping[str, Any]) -> None:
    """Checks names, shapes and formats of all tensors of the model.

    `given` is what config.json itself says of the model.

    Raises:
        CheckpointError: if a tensor is missing, left over, or of another shape or format; it is named.
    """
    architecture = settings.architecture
    found = _tensors(files, architecture)
    defaults = [key for key in map(architecture.key, architecture.counts) if key not in given]
    hint = f" (config.json lacks {', '.join(defaults)}: transformers' defaults hold)" if defaults else ""
    pooler = architecture.has_pooler and any(name.startswith("pooler.") for name in found)
    for common_name, shape in expected_shapes(settings, pooler=pooler).items():
        name = architecture.own_name(common_name)
        if common_name not in found:
            raise CheckpointError(f"the weights lack {name}{hint}; fetch the model again, or correct config.json")
        own_shape, kind = found.pop(common_name)
        if own_shape != shape:
            raise CheckpointError(
                f"{name} has shape {own_shape}, config.json says {shape}{hint}; correct it, or fetch the model again"
            )
        if kind not in FLOATS:
            raise CheckpointError(
                f"{name} has the format {kind}; layertap reads {', '.join(FLOATS)}, save the model in one of these"
            )
    left = sorted(architecture.own_name(name) for name in found if architecture.is_own(name) and name not in _BUFFERS)
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        listed = shortened(", ".join(left[:3]), _LISTED_LENGTH) + more
        raise CheckpointError(
            f"the weights have {listed}, which the model of config.json does not have; its numbers would be others, "
            f"so correct config.json, or choose a checkpoint of a plain {settings.model_type}"
        )


def _tensors(files: Sequence[Path], architecture: Architecture) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns shape and format of each tensor by its name in BertModel."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for path in files:
        for name, header in tensor_headers(path).items():
            common = architecture.common_name(name)
            if common in found and architecture.is_own(common):
                raise CheckpointError(f"the weights have {name} twice; fetch the model again")
            found[common] = header
    return found


def tensor_headers(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns shape and format of each tensor of a safetensors file by its name.

    Raises:
        CheckpointError: if it cannot be read.
    """
    check_file(path)
    try:
        with safetensors.safe_open(path, framework="np") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # It cannot be iterated.
            return {name: (tuple(part.get_shape()), str(part.get_dtype())) for name, part in parts.items()}
    except (OSError, safetensors.SafetensorError) as exc:
        raise CheckpointError(
            f"{path.name} cannot be read as safetensors ({reason_of(exc)}); fetch the model again"
        ) from exc


def expected_shapes(settings: ModelSettings, *, pooler: bool) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every weight of a model, by its name in BertModel."""
    hidden, intermediate = settings.hidden_size, settings.intermediate_size
    embedded = settings.embedding_size
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(prefix: str, size: int) -> None:
        shapes[f"{prefix}.LayerNorm.weight"] = shapes[f"{prefix}.LayerNorm.bias"] = (size,)

    def linear(name: str, out_size: int, in_size: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out_size, in_size), (out_size,)

    shapes["embeddings.word_embeddings.weight"] = settings.vocab_size, embedded
    shapes["embeddings.position_embeddings.weight"] = settings.max_position_embeddings, embedded
    if settings.type_vocab_size:
        shapes["embeddings.token_type_embeddings.weight"] = settings.type_vocab_size, embedded
    norm("embeddings", embedded)
    if embedded != hidden:
        linear("embeddings_project", hidden, embedded)
    for index in range(settings.num_hidden_layers):
        prefix = f"encoder.layer.{index}"
        for part in ("query", "key", "value"):
            linear(f"{prefix}.attention.self.{part}", hidden, hidden)
        linear(f"{prefix}.attention.output.dense", hidden, hidden)
        norm(f"{prefix}.attention.output", hidden)
        linear(f"{prefix}.intermediate.dense", intermediate, hidden)
        linear(f"{prefix}.output.dense", hidden, intermediate)
        norm(f"{prefix}.output", hidden)
    if pooler:
        linear("pooler.dense", hidden, hidden)
    return shapes
