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

from layertap_server.model.files import CheckpointError, read_json, shortened
from layertap_server.model.sentence_modules import (
    MAX_COUNT,
    Dense,
    Module,
    Normalize,
    UnsupportedModuleError,
    of_tokens,
    read_dense,
)
from layertap_server.types import Strategy

_TRANSFORMER_NAMES: Final = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
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

_REASONS_LENGTH: Final = 1000

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
        strategies: The poolings of the last layer; several are joined in this order. None: the folder makes token rows
            and no vector.
        normalize: Whether the vector has then length 1: the last of its modules divides it by its Euclidean length.
        dimensions: How many values are then kept; 0 keeps all.
        lower_case: Whether strings are turned to lower case before tokenizing.
        prompts: What may stand before a text, by name.
        default_prompt_name: The prompt where a request names none; "" for none.
        include_prompt: Whether the tokens of a prompt are pooled.
        token_modules: What is done to the token rows of the last layer before they are pooled, in this order.
        vector_modules: What is done to the vector after the pooling, in this order, Normalize among it.
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
    token_modules: tuple[Module, ...] = ()
    vector_modules: tuple[Module, ...] = ()
    unsupported: str = ""

    @property
    def dense_modules(self) -> tuple[Dense, ...]:
        """The modules that have weights."""
        return tuple(one for one in (*self.token_modules, *self.vector_modules) if isinstance(one, Dense))

    @property
    def vectors_unsupported(self) -> str:
        """Why there are no sentence vectors, as a clause; "" if there are."""
        return self.unsupported or ("" if self.strategies else "its folder has no Pooling module")

    @property
    def has_modules(self) -> bool:
        """Whether more is done than poolings, normalizing their vector and cutting it."""
        return bool(self.token_modules or self.dense_modules)

    @property
    def description(self) -> str:
        """All that decides what vector a text has, as a string for the fingerprint."""
        known = dataclasses.asdict(dataclasses.replace(self, token_modules=(), vector_modules=(), unsupported=""))
        del known["token_modules"], known["vector_modules"]  # Models without a Dense keep the fingerprint they had.
        if self.has_modules:
            known["modules"] = [
                [one.description if isinstance(one, Dense) else dataclasses.asdict(one) for one in modules]
                for modules in (self.token_modules, self.vector_modules)
            ]
        return json.dumps(known, sort_keys=True, default=lambda strategy: strategy.name)

    def token_size(self, hidden_size: int) -> int:
        """Returns how many values a token row has after the modules."""
        return next((one.out_size for one in reversed(self.token_modules) if isinstance(one, Dense)), hidden_size)

    def vector_size(self, hidden_size: int) -> int:
        """Returns how many values the vector has after the modules, before it is cut."""
        sizes = (one.out_size for one in reversed(self.vector_modules) if isinstance(one, Dense))
        return next(sizes, self.token_size(hidden_size) * len(self.strategies))


def read(folder: Path, *, hidden_size: int, max_length: int, position_count: int, truncation: str) -> SentenceConfig:
    """Reads what a folder says.

    `max_length` and `truncation` are those of its tokenizer; `position_count` is the most tokens that the model can
    take.
    """
    reading = _Reading(folder, SentenceConfig(max_length=max_length, truncation=truncation))
    if (folder / "modules.json").is_file():
        reading.read_whole()
        reading.read_transformer()
        reading.read_modules(hidden_size)
    most = min(reading.config.max_length, position_count)
    unsupported = shortened("; ".join(reading.reasons), _REASONS_LENGTH)
    return dataclasses.replace(reading.config, max_length=most, unsupported=unsupported)


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
    """Returns the folder of a module; None: it is not inside the model's, or cannot be the name of a folder."""
    name = str(module.get("path") or "")
    path = PurePosixPath(name)
    return None if path.is_absolute() or ".." in path.parts or not name.isprintable() else path


class _Reading:
    """What is known of a folder so far, and the reasons why that is not all."""

    def __init__(self, folder: Path, config: SentenceConfig) -> None:
        self.config = config
        self.reasons: list[str] = []
        self._folder = folder
        self._pools = False

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

    def read_modules(self, hidden_size: int) -> None:
        """Reads the modules; each Dense must take as many values as there are at its place."""
        self._set(strategies=())
        modules = self._json("modules.json", list)
        if len(modules) > MAX_COUNT:
            self.reasons.append(f"modules.json has {len(modules)} modules, the most is {MAX_COUNT}")
        for place, module in enumerate(modules[:MAX_COUNT]):
            described = module if isinstance(module, dict) else {}
            kind, path = _kind_of(described), _path_of(described)
            if path is None:
                self.reasons.append("modules.json names a folder that is not the model's own")
            elif (kind, place) == ("Transformer", 0) and self._folder / path == transformer_folder(self._folder):
                continue
            elif kind == "Pooling" and place > 0 and not self._pools:
                self._read_pooling(f"{path}/config.json")
            elif kind in ("Dense", "Normalize", "Dropout") and place > 0:
                try:
                    self._read_module(kind, path, hidden_size)
                except UnsupportedModuleError as exc:
                    self.reasons.append(f"module {kind}: {exc}")
            else:
                self.reasons.append(f"layertap has no module {kind} at place {place} of modules.json")
        if not self._pools and not self.config.token_modules:
            self.reasons.append("modules.json has no Pooling module")

    def _read_module(self, kind: str, path: PurePosixPath, hidden_size: int) -> None:
        """Adds a module to those of token rows or of the vector."""
        name = f"{path}/config.json"
        found = self._json(name)
        if kind == "Dropout":  # It does nothing to a trained model.
            if set(found) - {"dropout"}:
                raise UnsupportedModuleError(f"{name} sets more than its dropout")
            return
        module: Module = (
            Normalize(of_tokens=of_tokens(found, name))
            if kind == "Normalize"
            else read_dense(found, self._folder / path, name)
        )
        config = self.config
        if module.of_tokens == self._pools:
            what = "token rows after they are pooled" if self._pools else "the vector before there is one"
            raise UnsupportedModuleError(f"{name} works on {what}")
        size = config.token_size(hidden_size) if module.of_tokens else config.vector_size(hidden_size)
        if isinstance(module, Dense) and module.in_size != size:
            raise UnsupportedModuleError(f"{name} takes {module.in_size} values where there are {size}")
        if module.of_tokens:
            self._set(token_modules=(*config.token_modules, module))
        else:
            self._set(vector_modules=(*config.vector_modules, module), normalize=kind == "Normalize")

    def _read_pooling(self, name: str) -> None:
        self._pools = True
        found = self._json(name)
        modes = found.get("pooling_mode") or [mode for flag, mode in _FLAGS.items() if found.get(flag)] or ["mean"]
        modes = list(map(str, modes if isinstance(modes, list) else [modes]))
        self._set(include_prompt=bool(found.get("include_prompt", True)))
        if odd := [mode for mode in modes if mode not in _STRATEGIES]:
            self.reasons.append(f"layertap does not pool by {', '.join(odd)} ({name})")
        else:
            self._set(strategies=tuple(_STRATEGIES[mode] for mode in modes))

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
