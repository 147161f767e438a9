"""Stage 2 of the GPU benchmark: the figures, each as a ratio to what the card or a peer can do, measured beside it."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_models import (
    SHAPES,
    Setting,
    all_layers_of,
    batches_of,
    ceilings,
    flops_of,
    folder_of,
    load,
    pooled_of,
    run_bulk,
    setting,
    texts_of,
    tokens_per_second,
)

from layertap import Client
from layertap_server.engine.encoder import Encoder
from layertap_server.testing import running_server

REQUIRED = {"bert-base": 0.45, "bert-large": 0.5, "tiny": 0.0}
CLIENT_COUNT = 8
SUBSCRIBER = """
import sys, time
from layertap import Client
address, count, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
texts = [" ".join(["word7"] * (length - 2))] * count
with Client(address) as client:
    client.embed(texts[:8], pooling="mean")
    print("ready", flush=True)
    sys.stdin.readline()
    assert sum(1 for _ in client.embed_stream(texts, pooling="mean")) == count
    print("done", flush=True)
"""


def main() -> None:
    at = setting()
    flops, copy = ceilings(at)
    at.add("ceiling: bf16 matrix product, TFLOP/s", flops / 1e12)
    at.add("ceiling: copy to pinned host memory, GB/s", copy / 1e9)
    with tempfile.TemporaryDirectory() as made:
        folders = {shape: folder_of(Path(made), shape) for shape in at.shapes}
        for shape, folder in folders.items():
            encoder = load(folder, at.device, "bfloat16")
            rate = pooled(at, encoder, shape, flops)
            if shape == at.shapes[0]:
                lengths(at, encoder, rate)
                layers(at, encoder, copy)
                idle(at, encoder)
                engine_rate = rate
            del encoder
        folder = folders[at.shapes[0]]
        with running_server("--device", at.device, "--dtype", "bfloat16", "--model-id", str(folder)) as server:
            lone(at, server.address)
            shared_memory(at, server.address, copy)
            sentence_transformers(at, server.address, folder)
            many_clients(at, server.address, engine_rate)


def pooled(at: Setting, encoder: Encoder, shape: str, flops: float) -> float:
    length, count = (16, 64) if at.quick else (128, 256 * 24)
    batches = batches_of(texts_of([length] * count), pooled_of(encoder), "float32")
    rate = tokens_per_second(encoder, batches)
    part = rate * flops_of(encoder, length) / flops
    at.add(f"{shape}, ids to pooled, {length} tokens, tokens/s", rate, ratio=part, required=REQUIRED[shape])
    return rate


def lengths(at: Setting, encoder: Encoder, rate: float) -> None:
    chance = random.Random(0)
    count = 64 if at.quick else 12_000
    mixed = [min(512, max(3, int(chance.lognormvariate(3.3, 0.85)))) for _ in range(count)]
    for label, chosen, required in (("natural lengths", mixed, 0.7), ("8 tokens", [8] * 4 * count, 0.25)):
        batches = batches_of(texts_of(chosen), pooled_of(encoder), "float32")
        own = tokens_per_second(encoder, batches)
        mean = statistics.mean(chosen)
        at.add(f"{label} (mean {mean:.0f}), tokens/s, to 128 tokens'", own, ratio=own / rate, required=required)


def layers(at: Setting, encoder: Encoder, copy: float) -> None:
    length, count = (16, 64) if at.quick else (128, 256 * 12)
    batches = batches_of(texts_of([length] * count), all_layers_of(encoder), "float16")
    rate = tokens_per_second(encoder, batches) * (encoder.layer_count + 1) * encoder.hidden_size * 2
    at.add("all layers, float16, to host memory, GB/s, to pinned copies", rate / 1e9, ratio=rate / copy, required=0.8)


def idle(at: Setting, encoder: Encoder) -> None:
    """Finds from the profiler how long no kernel runs between the first and the last of a bulk run."""
    if not at.on_gpu:
        return
    batches = batches_of(texts_of([128] * 256 * 12), pooled_of(encoder), "float32")
    run_bulk(encoder, batches)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run_bulk(encoder, batches)
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and "emcpy" not in event.name
    )
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    at.add("device idle in bulk, part of the time", 1 - busy / (end - spans[0][0]), required=0.1)


def lone(at: Setting, address: str) -> None:
    with Client(address) as client:
        times = []
        for _ in range(20 if at.quick else 300):
            started = time.perf_counter()
            client.embed("word1 word2 word3 word4", pooling="mean")
            times.append(time.perf_counter() - started)
    at.add("a lone short text over gRPC, p50 ms", statistics.median(times[5:]) * 1e3, required=4.0)


def shared_memory(at: Setting, address: str, copy: float) -> None:
    texts = [" ".join(["word7"] * (6 if at.quick else 126))] * (16 if at.quick else 256)
    with Client(address, shared_memory=True) as client:
        times = []
        for _ in range(6):
            started = time.perf_counter()
            embedding = client.embed(texts, layers="all", dtype="float16")
            byte_count = sum(rows.nbytes for layer in embedding.layers for rows in embedding.ragged(layer))
            times.append(time.perf_counter() - started)
    rate = byte_count / statistics.median(times[1:])
    at.add("all layers over shared memory, one client, GB/s", rate / 1e9, ratio=rate / copy, required=0.25)


def sentence_transformers(at: Setting, address: str, folder: Path) -> None:
    """Measures texts to vectors over gRPC, alternating with sentence-transformers at its best on this card."""
    import sentence_transformers as st
    from sentence_transformers.sentence_transformer import modules

    count = 32 if at.quick else 6000
    chance = random.Random(0)
    texts = [
        " ".join(f"word{chance.randrange(30000)}" for _ in range(min(510, int(chance.lognormvariate(3.3, 0.85)) + 1)))
        for _ in range(count)
    ]
    dtype = torch.float16 if at.on_gpu else torch.float32
    theirs: dict[str, Callable[[], Any]] = {}
    for attention in ("sdpa", "flash_attention_2"):
        try:
            words = modules.Transformer(str(folder), model_kwargs={"dtype": dtype, "attn_implementation": attention})
            pooling = modules.Pooling(SHAPES[folder.name][0], "mean")
            model = st.SentenceTransformer(modules=[words, pooling], device=at.device)
            model.encode(texts[:32])
        except Exception as exc:  # Its packages, or the device, may lack it.
            at.add(f"sentence-transformers with {attention}", f"not available: {type(exc).__name__}")
            continue
        for size in (32, 128, 512):
            theirs[f"{attention}, batches of {size}"] = lambda model=model, size=size: model.encode(
                texts, batch_size=size, show_progress_bar=False
            )
    best = min(theirs, key=lambda label: _timed(theirs[label]))
    with Client(address) as client:

        def ours() -> None:
            assert sum(1 for _ in client.embed_stream(texts, pooling="mean")) == count

        ours()
        pairs = [(_timed(ours), _timed(theirs[best])) for _ in range(3)]
    ratio = statistics.median(their / own for own, their in pairs)
    rate = count / statistics.median(own for own, _ in pairs)
    at.add(f"text to vectors over gRPC, texts/s, to sentence-transformers ({best})", rate, ratio=ratio, required=1.3)


def many_clients(at: Setting, address: str, engine_rate: float) -> None:
    """Measures client processes that stream texts at the same time."""
    length, count = (8, 16) if at.quick else (128, 2000)
    clients = [
        subprocess.Popen(
            [sys.executable, "-c", SUBSCRIBER, address, str(count), str(length)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(CLIENT_COUNT)
    ]
    try:
        for client in clients:
            assert client.stdout is not None and client.stdout.readline().strip() == "ready"
        started = time.perf_counter()
        for client in clients:
            assert client.stdin is not None
            client.stdin.write("\n")
            client.stdin.flush()
        for client in clients:
            assert client.stdout is not None and client.stdout.readline().strip() == "done"
        rate = CLIENT_COUNT * count * length / (time.perf_counter() - started)
    finally:
        for client in clients:
            client.kill()
            client.wait()
    label = f"over gRPC, {CLIENT_COUNT} client processes, tokens/s, to the engine"
    at.add(label, rate, ratio=rate / engine_rate, required=0.7)


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
