"""What a model's folder says about sentences: how sentence-transformers makes one vector of a text with this model.

Read from its modules.json, the configurations beside it and those of each module, as sentence-transformers reads them.
Without modules.json it takes the mean of the last layer and so do we. What this server cannot do is kept as
`unsupported`: such a model is served like any other, only its sentence vectors are refused, never made otherwise.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final

from layertap_server.model.files import CheckpointError, read_json
from layertap_server.types import Strategy

_TRANSFORMER_NAMES: Final = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
"""The configuration of the Transformer module has one of these names; the first that is not empty holds."""

_STRATEGIES: Final = {
    "cls": Strategy.CLS,
    "max": Strategy.MAX,
    "mean": Strategy.MEAN,
    "mean_sqrt_len_tokens": Strategy.MEAN_SQRT_LEN,
    "lasttoken": Strategy.LAST,
}
_FLAGS: Final = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""What poolings were called before they had names, in the order in which several are joined."""

_READ_OR_IDLE: Final = frozenset(
    ("max_seq_length", "do_lower_case", "unpad_inputs", "query_length", "document_length", "query_expansion")
)
"""Settings of the Transformer module that are read here, or change nothing in a plain `encode`."""

_AS_EVER: Final = {
    "transformer_task": "feature-extraction",
    "module_output_name": "token_embeddings",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
}
"""Settings of the Transformer module that say what this server does anyway."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SentenceConfig:
    """How a text becomes one vector.

    Attributes:
        max_length: The most tokens of one text; longer ones are cut.
        truncation: The side that is cut, "right" or "left".
        strategies: The poolings of the last layer; several are joined in this order.
        normalize: Whether the vector is then divided by its Euclidean length.
        dimensions: How many values are then kept; 0 keeps all.
        lower_case: Whether strings are turned to lower case before tokenizing.
        prompts: What may stand before a text, by name.
        default_prompt_name: The prompt of callers who name none; "" for none.
        include_prompt: Whether the tokens of a prompt are pooled.
        unsupported: What this server cannot do of all that, as a clause; "" if there is nothing.
    """

    max_length: int
    truncation: str = "right"
    strategies: tuple[Strategy, ...] = (Strategy.MEAN,)
    normalize: bool = False
    dimensions: int = 0
    lower_case: bool = False
    prompts: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"query": "", "document": ""})
    default_prompt_name: str = ""
    include_prompt: bool = True
    unsupported: str = ""

    @property
    def description(self) -> str:
        """All that decides what vector a text has, as a string for the fingerprint."""
        known = dataclasses.replace(self, unsupported="")
        return json.dumps(dataclasses.asdict(known), sort_keys=True, default=lambda strategy: strategy.name)


def read(folder: Path, *, max_length: int, position_count: int, truncation: str) -> SentenceConfig:
    """Reads what a folder says.

    Args:
        folder: The model's.
        max_length: The most tokens of one text by its tokenizer.
        position_count: The most that the model can take.
        truncation: The side that its tokenizer cuts.
    """
    reading = _Reading(folder, SentenceConfig(max_length=max_length, truncation=truncation))
    if (folder / "modules.json").is_file():
        reading.read_whole()
        reading.read_transformer()
        reading.read_modules()
    config = reading.config
    return dataclasses.replace(
        config, max_length=min(config.max_length, position_count), unsupported="; ".join(reading.reasons)
    )


def transformer_folder(folder: Path) -> Path:
    """Returns where a model's configuration, weights and tokenizer are, such as in its 0_Transformer."""
    try:
        modules = read_json(folder / "modules.json")
    except (FileNotFoundError, CheckpointError):
        return folder  # What is wrong with it is said where sentence vectors are refused.
    first = modules[0] if isinstance(modules, list) and modules and isinstance(modules[0], dict) else {}
    path = _path_of(first)
    if _kind_of(first) != "Transformer" or path is None or not (folder / path / "config.json").is_file():
        return folder
    return folder / path


def _kind_of(module: Mapping[str, Any]) -> str:
    kind = str(module.get("type"))
    return kind.rpartition(".")[2] if kind.startswith("sentence_transformers.") else kind


def _path_of(module: Mapping[str, Any]) -> PurePosixPath | None:
    """Returns the folder of a module; None: it is not inside the model's."""
    path = PurePosixPath(str(module.get("path") or ""))
    return None if path.is_absolute() or ".." in path.parts else path


class _Reading:
    """What is known of a folder so far, and the reasons why that is not all."""

    def __init__(self, folder: Path, config: SentenceConfig) -> None:
        self.config = config
        self.reasons: list[str] = []
        self._folder = folder

    def read_whole(self) -> None:
        name = "config_sentence_transformers.json"
        found = self._json(name)
        if (kind := found.get("model_type") or "SentenceTransformer") != "SentenceTransformer":
            self.reasons.append(f"{name} says model_type {kind}, not SentenceTransformer")
        prompts = found.get("prompts") or {}
        if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
            self.reasons.append(f"{name} has prompts that are no strings")
            prompts = {}
        prompts = {**self.config.prompts, **{prompt: text or "" for prompt, text in prompts.items()}}
        default = str(found.get("default_prompt_name") or "")
        if default and default not in prompts:
            self.reasons.append(f"{name} has no prompt of its default_prompt_name")
            default = ""
        dimensions = self._count(found, "truncate_dim", name, least=1)
        self._set(prompts=prompts, default_prompt_name=default, dimensions=dimensions)

    def read_transformer(self) -> None:
        inside = transformer_folder(self._folder).relative_to(self._folder)
        name, found = "", {}
        for name in _TRANSFORMER_NAMES:
            if found := self._json(str(inside / name)):
                break
        max_length = self._count(found, "max_seq_length", name, least=2) or self.config.max_length
        self._set(max_length=max_length, lower_case=bool(found.get("do_lower_case")))
        for key, value in found.items():
            if value and key not in _READ_OR_IDLE and value != _AS_EVER.get(key):
                self.reasons.append(f"{name} sets {key}, which layertap does not follow")

    def read_modules(self) -> None:
        modules = self._json("modules.json", list)
        if len(modules) < 2:
            self.reasons.append("modules.json has no Pooling module")
        for place, module in enumerate(modules):
            described = module if isinstance(module, dict) else {}
            kind, path = _kind_of(described), _path_of(described)
            if path is None:
                self.reasons.append("modules.json names a folder that is not the model's own")
            elif (kind, place) == ("Transformer", 0) and self._folder / path == transformer_folder(self._folder):
                continue
            elif (kind, place) == ("Pooling", 1):
                self._read_pooling(f"{path}/config.json")
            elif kind == "Normalize" and place > 1:
                self._read_normalize(f"{path}/config.json")
            else:
                self.reasons.append(f"layertap has no module {kind} at place {place} of modules.json")

    def _read_pooling(self, name: str) -> None:
        found = self._json(name)
        modes = found.get("pooling_mode") or [mode for flag, mode in _FLAGS.items() if found.get(flag)] or ["mean"]
        modes = list(map(str, modes if isinstance(modes, list) else [modes]))
        self._set(include_prompt=bool(found.get("include_prompt", True)))
        if odd := [mode for mode in modes if mode not in _STRATEGIES]:
            self.reasons.append(f"layertap does not pool by {', '.join(odd)} ({name})")
        else:
            self._set(strategies=tuple(_STRATEGIES[mode] for mode in modes))

    def _read_normalize(self, name: str) -> None:
        found = self._json(name)
        self._set(normalize=True)
        if any(found.get(f"module_{way}_name") not in (None, "sentence_embedding") for way in ("input", "output")):
            self.reasons.append(f"{name} normalizes something else than the sentence's vector")

    def _count(self, found: Mapping[str, Any], key: str, name: str, *, least: int) -> int:
        value = found.get(key)
        if value is None:
            return 0
        if type(value) is int and value >= least:
            return value
        self.reasons.append(f"{name} has a {key} that is no number from {least}")
        return 0

    def _json(self, name: str, kind: type[Any] = dict) -> Any:
        """Returns the contents of a file, or nothing in their place if it is not there or of no use."""
        try:
            found = read_json(self._folder / name)
        except FileNotFoundError:
            return kind()
        except CheckpointError:
            found = None
        if isinstance(found, kind):
            return found
        self.reasons.append(f"{name} cannot be read")
        return kind()

    def _set(self, **fields: Any) -> None:
        self.config = dataclasses.replace(self.config, **fields)
