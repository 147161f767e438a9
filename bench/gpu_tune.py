"""Stage 3 of the GPU benchmark: variants side by side, to choose the constants of the engine by."""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from pathlib import Path

from gpu_models import (
    Setting,
    all_layers_of,
    batches_of,
    folder_of,
    load,
    pooled_of,
    setting,
    texts_of,
    tokens_per_second,
)

from layertap_server.engine.encoder import Encoder
from layertap_server.types import Plan, Run


def main() -> None:
    at = setting()
    # The trials at start say in the log which ways they chose and how much faster those are.
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as made:
        folder = folder_of(Path(made), at.shapes[0])
        encoder = load(folder, at.device, "bfloat16")
        batch_sizes(at, encoder)
        instances(at, encoder)
        small_batches(at, encoder)
        attention_lengths(at, encoder)
        del encoder
        for dtype in ("float32", "float16") if at.on_gpu else ("float32",):
            encoder = load(folder, at.device, dtype)
            batches = batches_of(texts_of([128] * (8 if at.quick else 256 * 6)), pooled_of(encoder), "float32")
            at.add(f"{dtype}, ids to pooled, 128 tokens, tokens/s", tokens_per_second(encoder, batches))
            del encoder


def batch_sizes(at: Setting, encoder: Encoder) -> None:
    texts = texts_of([128] * (8 if at.quick else 256 * 12))
    for tokens in (8192, 16_384, 32_768, 65_536, 131_072):
        for label, output, dtype in (
            ("pooled", pooled_of(encoder), "float32"),
            ("all layers", all_layers_of(encoder), "float16"),
        ):
            rate = tokens_per_second(encoder, batches_of(texts, output, dtype, tokens), rounds=2)
            at.add(f"batches of {tokens} tokens, {label}, tokens/s", rate)


def instances(at: Setting, encoder: Encoder) -> None:
    batches = batches_of(texts_of([128] * (8 if at.quick else 256 * 12)), pooled_of(encoder), "float32")
    for count in (1, 2, 3):
        at.add(f"{count} instances, tokens/s", tokens_per_second(encoder, batches, instances=count, rounds=2))


def small_batches(at: Setting, encoder: Encoder) -> None:
    """Times single batches: up to 1,024 rows they may run as graphs; masked ones never do."""
    for length in (4, 16, 64, 128, 256, 512):
        for label, texts in (("one text", texts_of([length])), ("four texts", texts_of([length // 2 + 1] * 4))):
            run = Run(plan=Plan(outputs=(pooled_of(encoder),), dtype="float32"), texts=texts)
            times = []
            for _ in range(5 if at.quick else 40):
                started = time.perf_counter()
                list(encoder.encode([run]))
                times.append(time.perf_counter() - started)
            at.add(f"{label}, longest {texts[0].token_count}, p50 ms", statistics.median(times[3:]) * 1e3)


def attention_lengths(at: Setting, encoder: Encoder) -> None:
    for length in (4, 8, 16, 32, 64, 128, 256, 512):
        count = 4 if at.quick else 32_768 * 6 // length
        batches = batches_of(texts_of([length] * count), pooled_of(encoder), "float32")
        at.add(f"texts of {length} tokens, tokens/s", tokens_per_second(encoder, batches, rounds=2))


if __name__ == "__main__":
    main()
