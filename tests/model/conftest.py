"""A small checkpoint, its weights, and a copy of it that a test may spoil."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import safetensors.torch
from support.checkpoints import SMALL, Weights, save


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
