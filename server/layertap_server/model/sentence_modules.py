"""The modules of sentence-transformers that come beside Transformer and Pooling: Dense, Normalize and Dropout.

They run in the engine, behind the pooling or on token rows: so every client gets their vectors, in whatever language,
and token rows leave at the size that they have after a Dense, which is mostly a fraction of the model's. Only names,
shapes and formats of weights are read here.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from layertap_server.model.files import CheckpointError
from layertap_server.model.weights import FLOATS, tensor_headers

TOKENS: Final = "token_embeddings"
VECTOR: Final = "sentence_embedding"

_ACTIVATIONS: Final = frozenset(
    ("Identity", "Tanh", "ReLU", "ReLU6", "LeakyReLU", "GELU", "SiLU", "Sigmoid", "ELU", "SELU", "Mish", "Softplus")
)
"""The activations of torch.nn that have no weights and look at each number by itself."""
_ACTIVATION_PLACES: Final = ("torch.nn", "torch.nn.modules.activation", "torch.nn.modules.linear")
_FILE: Final = "model.safetensors"
MAX_COUNT: Final = 32
"""The most modules of a folder."""
_MAX_SIZE: Final = 16_384
"""The most values that a Dense takes or gives: each row of a batch takes so much memory at once, whatever is sent."""


class UnsupportedModuleError(Exception):
    """A module does what this server does not; the message is a clause that says what."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Normalize:
    """Divides by the Euclidean length.

    Attributes:
        of_tokens: Whether it works on token rows; else on the vector.
    """

    of_tokens: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """A dense layer with an activation, and perhaps a residual connection.

    Attributes:
        of_tokens: Whether it works on token rows; else on the vector.
        activation: The class of torch.nn.
        has_residual: Whether what it takes is added to what it gives, projected if the sizes differ.
        digest: sha256 of that file, in hex.
    """

    of_tokens: bool
    in_size: int
    out_size: int
    has_bias: bool
    activation: str
    has_residual: bool
    weights: Path
    digest: str

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each of its weights, by its name."""
        shapes: dict[str, tuple[int, ...]] = {"linear.weight": (self.out_size, self.in_size)}
        if self.has_bias:
            shapes["linear.bias"] = (self.out_size,)
        if self.has_residual and self.in_size != self.out_size:
            shapes["residual.weight"] = (self.out_size, self.in_size)
        return shapes

    @property
    def description(self) -> dict[str, Any]:
        """What decides the numbers, for the fingerprint."""
        named = dataclasses.asdict(self)
        del named["weights"]
        return named


Module = Normalize | Dense


def read_dense(found: Mapping[str, Any], folder: Path, name: str) -> Dense:
    """Returns a Dense by its config.json and the header of its weights.

    Raises:
        UnsupportedModuleError: if it cannot be computed here as sentence-transformers computes it.
    """
    sizes: list[int] = [found.get("in_features", 0), found.get("out_features", 0)]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise UnsupportedModuleError(f"{name} has in_features and out_features {sizes!r:.80}")
    if max(sizes) > _MAX_SIZE:
        raise UnsupportedModuleError(f"{name} has in_features and out_features {sizes!r:.80}, the most is {_MAX_SIZE}")
    place, _, activation = str(found.get("activation_function", "torch.nn.Tanh")).rpartition(".")
    if place not in _ACTIVATION_PLACES or activation not in _ACTIVATIONS:
        raise UnsupportedModuleError(
            f"layertap does not compute the activation_function {found['activation_function']!r:.80} of {name}; it "
            f"computes {', '.join(sorted(_ACTIVATIONS))} of torch.nn"
        )
    path = folder / _FILE
    if not path.is_file():
        raise UnsupportedModuleError(
            f"{name} has no {_FILE} beside it, and pickles are never opened: load the model with sentence-transformers "
            "and save it with safe_serialization=True"
        )
    dense = Dense(
        of_tokens=of_tokens(found, name),
        in_size=sizes[0],
        out_size=sizes[1],
        has_bias=bool(found.get("bias", True)),
        activation=activation,
        has_residual=bool(found.get("use_residual", False)),
        weights=path,
        digest="",
    )
    try:
        headers = tensor_headers(path)
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except (OSError, CheckpointError) as exc:
        raise UnsupportedModuleError(f"the weights beside {name} cannot be read") from exc
    shapes = {key: shape for key, (shape, _) in headers.items()}
    if shapes != dense.shapes or not all(kind in FLOATS for _, kind in headers.values()):
        raise UnsupportedModuleError(f"the weights beside {name} are not those of its config")
    return dataclasses.replace(dense, digest=digest)


def of_tokens(found: Mapping[str, Any], name: str) -> bool:
    """Returns whether a module works on token rows, by its config.json; else on the vector.

    Raises:
        UnsupportedModuleError: if it works on something else.
    """
    source = found.get("module_input_name") or VECTOR
    if source not in (TOKENS, VECTOR) or (found.get("module_output_name") or source) != source:
        raise UnsupportedModuleError(f"{name} works on something else than the vector or the token rows")
    return bool(source == TOKENS)
