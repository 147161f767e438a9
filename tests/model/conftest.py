"""A small checkpoint, its weights and a copy that a test may spoil; an encoder on a stand-in for an accelerator."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import safetensors.torch
from support.checkpoints import SMALL, Weights, save
from support.simulated_gpu import SimulatedGpu

from layertap_server.engine.encoder import Encoder
from layertap_server.model import checkpoint
from layertap_server.model.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "small-bert", SMALL)


@pytest.fixture(scope="module")
def weights(small: Path) -> Weights:
    return safetensors.torch.load_file(small / "model.safetensors")


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    """A folder of the small model that a test may spoil."""
    return Path(shutil.copytree(small, tmp_path / "copied-bert"))


@pytest.fixture(scope="module")
def tiny_model(tiny_folder: Path) -> Checkpoint:
    return checkpoint.find(model_id=str(tiny_folder), revision="", name="", load_format="safetensors", seed=0)


@pytest.fixture(scope="module")
def gpu() -> SimulatedGpu:
    return SimulatedGpu()


@pytest.fixture(scope="module")
def encoder(tiny_model: Checkpoint, gpu: SimulatedGpu) -> Encoder:
    return Encoder(tiny_model, device="cpu", dtype="bfloat16", runtime=gpu)
