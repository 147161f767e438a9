"""Stage 2 of the GPU benchmark: the figures, each as a ratio to what the card or a peer can do, measured beside it."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gpu_models import (
    Setting,
    all_layers_of,
    batches_of,
    copy_rate,
    flops_of,
    folder_of,
    matmul_rate,
    pooled_of,
    run_bulk,
    run_rows,
    texts_of,
    tokens_per_second,
)

if TYPE_CHECKING:
    from layertap import Client
    from layertap_server.testing import ServerProcess

CLIENT_COUNT = 8
MEMORY = ("--max-batch-bytes", "--max-call-output-bytes", "--max-output-bytes", "--shared-memory-bytes")
"""Flags of the server that bound what layers take: their defaults suit a CPU."""
_PEER = "sentence-transformers at its best, texts/s"
SUBSCRIBER = """
import sys
from pathlib import Path
from layertap import Client
address, file = sys.argv[1:]
texts = Path(file).read_text().splitlines()
with Client(address) as client:
    client.embed(texts[:8], pooling="mean")
    print("ready", flush=True)
    sys.stdin.readline()
    assert sum(1 for _ in client.embed_stream(texts, pooling="mean")) == len(texts)
    print("done", flush=True)
"""


def ceilings(at: Setting) -> None:
    at.add("ceiling: bf16 matrix product of 8192, TFLOP/s", matmul_rate(at) / 1e12)
    at.add("ceiling: copy to pinned host memory, GB/s", copy_rate(at) / 1e9)


def base(at: Setting) -> None:
    _pooled(at, at.base, required=0.45, aim=0.65)


def large(at: Setting) -> None:
    _pooled(at, at.large, required=0.5, aim=0.7)


def natural(at: Setting) -> None:
    lengths = _natural_lengths(64 if at.quick else 24_000)
    _mixed(at, f"natural lengths, mean {statistics.mean(lengths):.0f}", lengths, required=0.7, aim=0.9)


def short(at: Setting) -> None:
    _mixed(at, "8 tokens", [8] * (256 if at.quick else 50_000), required=0.25, aim=0.5)


def layers(at: Setting) -> None:
    encoder, copy = at.encoder(at.base, "bfloat16"), copy_rate(at)
    length, count = (16, 64) if at.quick else (128, 256 * 12)
    batches = batches_of(texts_of([length] * count), all_layers_of(encoder), "float16", at.batch_tokens)
    rate = tokens_per_second(encoder, batches) * (encoder.layer_count + 1) * encoder.hidden_size * 2
    at.add(
        "all layers, float16, to host memory, GB/s, to pinned copies",
        rate / 1e9,
        ratio=rate / copy,
        required=0.8,
        aim=0.9,
    )


def idle(at: Setting) -> None:
    """Finds from the profiler how long no kernel runs between the first and the last of a bulk run."""
    if not at.on_gpu:
        return
    encoder = at.encoder(at.base, "bfloat16")
    batches = batches_of(texts_of([128] * 256 * 12), pooled_of(encoder), "float32", at.batch_tokens)
    run_bulk(encoder, batches)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run_bulk(encoder, batches)
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and "emcpy" not in event.name
    )
    if not spans:
        raise LookupError("the profiler saw no kernel; the driver may not permit it")
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    at.add(
        "device idle in bulk, part of the time", 1 - busy / (end - spans[0][0]), required=0.1, aim=0.03, at_most=True
    )


def lone(at: Setting) -> None:
    with _client(at.server()) as client:
        times = []
        for _ in range(20 if at.quick else 500):
            started = time.perf_counter()
            client.embed("word1 word2 word3 word4", pooling="mean")
            times.append((time.perf_counter() - started) * 1e3)
    at.add("a lone short text over gRPC, p50 ms", statistics.median(times[5:]), required=4.0, aim=2.0, at_most=True)
    at.add("a lone short text over gRPC, p99 ms", statistics.quantiles(times[5:], n=100)[-1])


def shared_memory(at: Setting) -> None:
    """Measures all layers of many texts in one client, whose rows lie in memory that it shares with the server."""
    copy = copy_rate(at)
    length, count = (64, 256) if at.quick else (128, 512)
    ids = [text.input_ids.tolist() for text in texts_of([length] * count)]
    sizes = (32, 64, 128, 64) if at.quick else (256, 1024, 4096, 3072)
    flags = [part for flag, size in zip(MEMORY, sizes, strict=True) for part in (flag, str(size << 20))]
    times = []
    with _client(at.server(*flags), shared_memory=True) as client:
        for _ in range(7):
            started = time.perf_counter()
            byte_count = sum(rows.nbytes for part in client.embed_layers(ids, dtype="float16") for rows in part.rows)
            times.append(time.perf_counter() - started)
        shared = client.shared_memory.byte_count / (byte_count * len(times))
    at.add("all layers over shared memory: the part that came so", shared)
    rate = byte_count / statistics.median(times[1:])
    what = "all layers over shared memory, one client, GB/s, to pinned copies"
    at.add(what, rate / 1e9, ratio=rate / copy, required=0.25, aim=0.5)


def peer(at: Setting) -> None:
    """Measures texts to vectors over gRPC, alternating with sentence-transformers at its best on this card."""
    file = _texts(at, _natural_lengths(32 if at.quick else 8000))
    texts = file.read_text().splitlines()
    with _client(at.server()) as client:
        command = [str(Path(__file__).with_name("gpu_peer.py")), str(folder_of(at, at.base)), str(file), at.device]
        theirs = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert theirs.stdin is not None and theirs.stdout is not None

        def ours() -> None:
            assert sum(1 for _ in client.embed_stream(texts, pooling="mean")) == len(texts)

        try:
            while (line := theirs.stdout.readline().strip()).startswith("tried "):
                at.add(f"sentence-transformers, {line[6:]}", "")
            ours()
            pairs = []
            for _ in range(3):
                own = _timed(ours)
                theirs.stdin.write("\n")
                pairs.append((own, float(theirs.stdout.readline())))
        finally:
            theirs.kill()
            theirs.wait()
    at.add(_PEER, len(texts) / statistics.median(their for _, their in pairs))
    ratio = statistics.median(their / own for own, their in pairs)
    rate = len(texts) / statistics.median(own for own, _ in pairs)
    what = f"text to vectors over gRPC, one client, texts/s, to sentence-transformers ({line})"
    at.add(what, rate, ratio=ratio, required=1.3, aim=2.0)


def peer_of_clients(at: Setting) -> None:
    """Measures the same texts from several client processes, of which sentence-transformers can have but one."""
    file = _texts(at, _natural_lengths(32 if at.quick else 8000))
    count = len(file.read_text().splitlines())
    rate = CLIENT_COUNT * count / _seconds_of_clients(at.server("--processes", "2").address, file)
    what = f"text to vectors over gRPC, {CLIENT_COUNT} clients, --processes 2, texts/s, to sentence-transformers"
    at.add(what, rate, ratio=rate / at.figure(_PEER), required=1.3, aim=2.0)


def clients(at: Setting) -> None:
    _many_clients(at, 1)


def clients_of_2(at: Setting) -> None:
    _many_clients(at, 2)


def clients_of_4(at: Setting) -> None:
    _many_clients(at, 4)


def _pooled(at: Setting, shape: str, *, required: float, aim: float) -> None:
    flops = matmul_rate(at)
    encoder = at.encoder(shape, "bfloat16")
    length, count = (16, 64) if at.quick else (128, 256 * 24)
    if shape == at.base:
        rate = at.rate()
    else:
        batches = batches_of(texts_of([length] * count), pooled_of(encoder), "float32", at.batch_tokens)
        rate = tokens_per_second(encoder, batches)
    per_token = flops_of(encoder, length)
    what = (
        f"{shape}, ids to pooled, {length} tokens, tokens/s ({per_token / 1e6:.0f} MFLOP each), to the matrix product"
    )
    at.add(what, rate, ratio=rate * per_token / flops, required=required, aim=aim)


def _mixed(at: Setting, label: str, lengths: Sequence[int], *, required: float, aim: float) -> None:
    encoder, rate = at.encoder(at.base, "bfloat16"), at.rate()
    batches = batches_of(texts_of(lengths), pooled_of(encoder), "float32", at.batch_tokens)
    own = tokens_per_second(encoder, batches)
    at.add(f"{label}, tokens/s, to 128 tokens'", own, ratio=own / rate, required=required, aim=aim)


def _natural_lengths(count: int) -> list[int]:
    """Returns lengths of texts as they come: most are short, some very long."""
    chance = random.Random(0)
    return [min(512, max(3, int(chance.lognormvariate(3.3, 0.85)))) for _ in range(count)]


def _texts(at: Setting, lengths: Sequence[int]) -> Path:
    """Writes texts of so many tokens, one a line."""
    chance = random.Random(0)
    lines = [" ".join(f"word{chance.randrange(30_000)}" for _ in range(max(1, length - 2))) for length in lengths]
    file = at.scratch / f"{at.row}.txt"
    file.write_text("\n".join(lines))
    return file


def _many_clients(at: Setting, process_count: int) -> None:
    """Measures client processes that stream texts at the same time."""
    length, count = (8, 16) if at.quick else (128, 4000)
    file = _texts(at, [length] * count)
    flags = ("--processes", str(process_count)) if process_count > 1 else ()
    rate = CLIENT_COUNT * count * length / _seconds_of_clients(at.server(*flags).address, file)
    label = f"over gRPC, {CLIENT_COUNT} client processes, --processes {process_count}, tokens/s, to the engine"
    at.add(label, rate, ratio=rate / at.rate(), required=0.7, aim=0.9)


def _seconds_of_clients(address: str, file: Path) -> float:
    """Returns how long client processes take that each stream all lines of a file, at the same time."""
    clients = [
        subprocess.Popen(
            [sys.executable, "-c", SUBSCRIBER, address, str(file)],
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
        return time.perf_counter() - started
    finally:
        for client in clients:
            client.kill()
            client.wait()


def _client(server: ServerProcess, **options: Any) -> Client:
    from layertap import Client  # Here: rows without a server do not need gRPC.

    return Client(server.address, **options)


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    run_rows(globals())
