"""Stage 1 of the GPU benchmark: is it right on this card? Fidelity and bits of each dtype, and the tests for cuda."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from gpu_models import Setting, all_layers_of, folder_of, run_rows, texts_of

from layertap_server.engine.encoder import Encoder
from layertap_server.model.checkpoint import EMBEDDED_MODEL
from layertap_server.parity.compare import BOUNDS
from layertap_server.types import Plan, Run, Text

REPOSITORY = Path(__file__).resolve().parent.parent
TESTS = ["tests/model"]
TESTS_WITHOUT_MODEL = ["tests/model/test_fast_paths.py"]
TESTS_TIMEOUT_S = 120
LAST_S = 8.0
"""How long counting the outcomes may take, before the stage ends."""
WORKERS = 6


def machine(at: Setting) -> None:
    """Notes what the figures were measured on."""
    at.add("torch, transformers, Python", f"{torch.__version__}, {transformers.__version__}, {sys.version.split()[0]}")
    at.add("processors", os.cpu_count() or 0)
    for program in ("gcc", "cc"):
        at.add(f"{program}, which triton needs", shutil.which(program) or "missing")
    if not at.on_gpu:
        return
    free, total = torch.cuda.mem_get_info(at.device)
    at.add("GPU", f"{torch.cuda.get_device_name(at.device)}, {free >> 20} of {total >> 20} MiB free")
    at.add("CUDA, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
    fields = "driver_version,clocks.sm,clocks.mem,power.limit,compute_mode,mig.mode.current"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        at.add(fields, subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.strip())


def float32(at: Setting) -> None:
    _check(at, "float32")


def bfloat16(at: Setting) -> None:
    _check(at, "bfloat16")


def float16(at: Setting) -> None:
    if at.on_gpu:
        _check(at, "float16")


def tests(at: Setting) -> None:
    """Runs the tests of the suite that are marked for cuda, those of the embedded model if it is there."""
    chosen = ["-m", "cuda", *(TESTS if EMBEDDED_MODEL.is_dir() else TESTS_WITHOUT_MODEL)]
    if not at.on_gpu:
        chosen = ["-k", "fast_path", *TESTS_WITHOUT_MODEL]
    options = ["-v", "-o", "filterwarnings=", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    options += [] if at.quick else ["-n", str(WORKERS)]
    log = at.results.with_name("tests.log")
    timeout_s = max(1.0, min(TESTS_TIMEOUT_S, at.ends_at - time.monotonic() - LAST_S))
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *chosen], cwd=REPOSITORY, stdout=out, stderr=out
        )
        try:
            code: int | str = process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            code = f"not done within {timeout_s:.0f} s"
    outcomes: dict[str, str] = {}
    for line in log.read_text().splitlines():
        # Lines of pytest-xdist and of its summary name the outcome first, those of pytest alone last.
        if found := re.search(r"\b(PASSED|FAILED|ERROR) (tests/.*?)(?: - .*)?$", line):
            outcomes[found[2]] = found[1]
        elif found := re.match(r"(tests/.*?) (PASSED|FAILED|ERROR)\b", line):
            outcomes[found[1]] = found[2]
    passed, all_of_them = list(outcomes.values()).count("PASSED"), len(outcomes)
    at.add(
        f"tests for cuda that pass, of {all_of_them} ({code})", passed, ratio=passed / max(1, all_of_them), required=1
    )
    for name in [name for name, outcome in outcomes.items() if outcome != "PASSED"][:30]:
        at.add(f"a test with {outcomes[name]}", name[:200])


def _check(at: Setting, dtype: str) -> None:
    encoder = at.encoder(at.base, dtype)
    try:
        _fidelity(at, encoder, dtype)
        _bits(at, encoder, dtype)
    finally:
        del encoder
        at.release()


def _fidelity(at: Setting, encoder: Encoder, dtype: str) -> None:
    """Compares every layer of texts of many lengths and masks with transformers in float32 on the CPU."""
    folder = folder_of(at, at.base)
    model = transformers.BertModel.from_pretrained(str(folder), attn_implementation="eager").float().eval()
    texts = texts_of([1, 5, 7, 7, 64, 130, 200, 512])
    ids = np.arange(10, 20, dtype=np.int32)
    texts += [Text(ids, attention_mask=np.array(mask, np.int32)) for mask in ([0, 1] * 5, [0] * 10)]
    wanted = []
    for text in texts:
        mask = np.ones(text.token_count, np.int32) if text.attention_mask is None else text.attention_mask
        with torch.inference_mode():
            found = model(
                input_ids=torch.from_numpy(text.input_ids[None]).long(),
                attention_mask=torch.from_numpy(mask[None]).long(),
                output_hidden_states=True,
            )
        wanted.append([states[0].numpy() for states in found.hidden_states])
    # Together, and by twos: small batches take other ways.
    for label, batches in (("together", [range(len(texts))]), ("in small batches", [range(n, n + 2) for n in (0, 2)])):
        worst = 0.0
        for batch in batches:
            layers, start = _layers(encoder, [texts[n] for n in batch]), 0
            for n in batch:
                end = start + texts[n].token_count
                differences = [float(np.abs(layers[k][start:end] - states).max()) for k, states in enumerate(wanted[n])]
                worst, start = float(np.max([worst, *differences])), end  # NaN stays NaN.
        at.add(
            f"fidelity, {dtype}, texts {label}: largest difference from transformers in float32",
            worst,
            required=BOUNDS[dtype],
            aim=BOUNDS[dtype] / 4,
            at_most=True,
        )


def _bits(at: Setting, encoder: Encoder, dtype: str) -> None:
    """Says for how many texts the last layer has the same bits alone and in two batches."""
    texts = texts_of([1, 3, 7, 8, 13, 16, 31, 64, 100, 128, 129, 300], seed=1)
    others = texts_of([5, 9, 20, 40, 250] * 8, seed=2)
    alone = [_layers(encoder, [text])[encoder.layer_count] for text in texts]
    again = [_layers(encoder, [text])[encoder.layer_count] for text in texts]
    same = sum(np.array_equal(one, other) for one, other in zip(alone, again, strict=True))
    at.add(f"bits, {dtype}: texts equal alone and alone once more, of {len(texts)}", same, ratio=same / len(texts))
    for label, batch in (("a batch", texts), ("a batch of many", others + texts)):
        rows = _layers(encoder, batch)[encoder.layer_count]
        rows = rows[len(rows) - sum(text.token_count for text in texts) :]
        equal, start = 0, 0
        for text, own in zip(texts, alone, strict=True):
            equal += np.array_equal(rows[start : start + text.token_count], own)
            start += text.token_count
        at.add(f"bits, {dtype}: texts equal alone and in {label}, of {len(texts)}", equal, ratio=equal / len(texts))


def _layers(encoder: Encoder, texts: list[Text]) -> dict[int, np.ndarray]:
    found = encoder.encode([Run(plan=Plan(outputs=(all_layers_of(encoder),), dtype="float32"), texts=texts)])
    return {rows.layer: np.frombuffer(rows.data, np.float32).reshape(-1, encoder.hidden_size) for rows in found}


if __name__ == "__main__":
    run_rows(globals())
