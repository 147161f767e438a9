"""Packs a model folder for a machine with a GPU: its files, with weights in half the bytes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.md"))
    weights = safetensors.numpy.load_file(source / "model.safetensors")
    half = {name: one.astype(np.float16) if one.dtype == np.float32 else one for name, one in weights.items()}
    safetensors.numpy.save_file(half, target / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()
