"""Stage 1 of the GPU benchmark: is it right on this card? The tests for cuda, fidelity and bits of each dtype."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from gpu_models import Setting, all_layers_of, folder_of, load, setting, texts_of

from layertap_server.engine.encoder import Encoder
from layertap_server.types import Plan, Run, Text

REPOSITORY = Path(__file__).resolve().parent.parent
BOUNDS = {"float32": 2e-5, "bfloat16": 0.1, "float16": 0.1}
TESTS = ["tests/model/test_device_paths.py", "tests/model/test_engine.py"]
TESTS_TIMEOUT_S = 100


def main() -> None:
    at = setting()
    name = torch.cuda.get_device_name(at.device) if at.on_gpu else "cpu"
    at.add(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}", "")
    with tempfile.TemporaryDirectory() as made:
        folder = folder_of(Path(made), at.shapes[0])
        for dtype in BOUNDS if at.on_gpu else ("float32", "bfloat16"):
            encoder = load(folder, at.device, dtype)
            fidelity(at, encoder, folder, dtype)
            bits(at, encoder, dtype)
            del encoder
    tests(at)


def fidelity(at: Setting, encoder: Encoder, folder: Path, dtype: str) -> None:
    """Compares every layer of texts of many lengths and masks with transformers in float32 on the CPU."""
    model = transformers.BertModel.from_pretrained(str(folder), attn_implementation="eager").eval()
    texts = texts_of([1, 5, 7, 7, 64, 130, 200])
    ids = np.arange(10, 20, dtype=np.int32)
    texts += [Text(ids, attention_mask=np.array(mask, np.int32)) for mask in ([0, 1] * 5, [0] * 10)]
    found = _layers(encoder, texts)
    worst, start = 0.0, 0
    for text in texts:
        mask = np.ones(text.token_count, np.int32) if text.attention_mask is None else text.attention_mask
        with torch.inference_mode():
            wanted = model(
                input_ids=torch.from_numpy(text.input_ids[None]).long(),
                attention_mask=torch.from_numpy(mask[None]).long(),
                output_hidden_states=True,
            ).hidden_states
        for layer, states in enumerate(wanted):
            own = found[layer][start : start + text.token_count]
            worst = max(worst, float(np.abs(own - states[0].numpy()).max()))
        start += text.token_count
    at.add(f"fidelity, {dtype}: largest difference", worst, ratio=worst / BOUNDS[dtype], required=1.0)


def bits(at: Setting, encoder: Encoder, dtype: str) -> None:
    """Says for how many texts the last layer has the same bits alone and in two batches."""
    texts = texts_of([1, 3, 7, 8, 13, 16, 31, 64, 100, 128, 129, 300], seed=1)
    others = texts_of([5, 9, 20, 40, 250] * 8, seed=2)
    alone = [_layers(encoder, [text])[encoder.layer_count] for text in texts]
    for label, batch in (("a batch", texts), ("a batch of many", others + texts)):
        rows = _layers(encoder, batch)[encoder.layer_count]
        rows = rows[len(rows) - sum(text.token_count for text in texts) :]
        equal, start = 0, 0
        for text, own in zip(texts, alone, strict=True):
            equal += np.array_equal(rows[start : start + text.token_count], own)
            start += text.token_count
        at.add(f"bits, {dtype}: texts equal alone and in {label}, of {len(texts)}", equal, ratio=equal / len(texts))


def tests(at: Setting) -> None:
    """Runs the tests of the suite that need the card and no other package or model."""
    marks = ["-m", "cuda"] if at.on_gpu else ["-k", "kernel or one_upload"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-o", "filterwarnings=", *marks, *TESTS]
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, env=dict(os.environ), capture_output=True, text=True, timeout=TESTS_TIMEOUT_S
        )
        lines = (done.stdout + done.stderr).strip().splitlines()
        at.add("tests for cuda", "\n".join(lines[-1:] if done.returncode == 0 else lines[-40:]))
    except subprocess.TimeoutExpired:
        at.add("tests for cuda", f"not done within {TESTS_TIMEOUT_S} s")


def _layers(encoder: Encoder, texts: list[Text]) -> dict[int, np.ndarray]:
    found = encoder.encode([Run(plan=Plan(outputs=(all_layers_of(encoder),), dtype="float32"), texts=texts)])
    return {rows.layer: np.frombuffer(rows.data, np.float32).reshape(-1, encoder.hidden_size) for rows in found}


if __name__ == "__main__":
    main()
