"""The weights of a model by their names in BertModel: taken one by one, each with its shape checked."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch

from layertap_server.engine.block import Norm
from layertap_server.engine.linear import Dense, Linears
from layertap_server.model.files import CheckpointError
from layertap_server.model.settings import ModelSettings
from layertap_server.model.weights import expected_shapes

Weights = dict[str, torch.Tensor]


class WeightReader:
    """Moves weights to a device, each out of the mapping that it reads, so that none is held twice.

    What is missing or has another shape is a `CheckpointError`.

    Attributes:
        settings: The model's settings.
        linears: Makes the dense layers, and names the device.
    """

    def __init__(self, weights: Weights, settings: ModelSettings, linears: Linears) -> None:
        """Empties a mapping with weights by any of their names."""
        self.settings = settings
        self.linears = linears
        self._architecture = settings.architecture
        self._weights = {self._architecture.common_name(name): weights.pop(name) for name in list(weights)}

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def table(self, name: str, *shape: int) -> torch.Tensor:
        """Returns a weight in float32."""
        return self._take(name, *shape).to(self.linears.device, torch.float32)

    def norm(self, prefix: str, size: int) -> Norm:
        """Returns a LayerNorm."""
        return Norm(self.table(f"{prefix}.LayerNorm.weight", size), self.table(f"{prefix}.LayerNorm.bias", size))

    def linear(self, *names: str, out_size: int, in_size: int) -> Dense:
        """Returns some dense layers as one, whose outputs follow each other."""
        weights = [self._take(f"{name}.weight", out_size, in_size) for name in names]
        biases = [self._take(f"{name}.bias", out_size) for name in names]
        if len(names) == 1:
            return self.linears.make(weights[0], biases[0])
        return self.linears.make(torch.cat(weights), torch.cat(biases))

    def _take(self, name: str, *shape: int) -> torch.Tensor:
        own_name = self._architecture.own_name(name)
        try:
            tensor = self._weights.pop(name)
        except KeyError as exc:
            raise CheckpointError(f"the weights lack {own_name}; fetch the model again") from exc
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{own_name} has shape {tuple(tensor.shape)}, config.json says {shape}; fetch the model again"
            )
        return tensor


def load_weights(path: Path, name: str) -> Weights:
    """Returns the tensors of a safetensors file; an error calls it by the name given.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as exc:
        raise CheckpointError(f"{name} cannot be read as safetensors; fetch the model again") from exc


def dummy_weights(settings: ModelSettings, seed: int) -> Weights:
    """Returns random weights for a model, the same for the same seed.

    Biases and LayerNorms are random too, so that a pass that omits one gives other numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = expected_shapes(settings, pooler=settings.architecture.has_pooler)
    return {
        name: torch.randn(shape, generator=generator) * settings.initializer_range + name.endswith("LayerNorm.weight")
        for name, shape in shapes.items()
    }
