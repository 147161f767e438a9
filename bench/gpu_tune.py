"""Stage 3 of the GPU benchmark: variants side by side, and where the time goes, to choose the constants by."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from gpu_models import (
    Setting,
    all_layers_of,
    batches_of,
    pooled_of,
    run_bulk,
    run_rows,
    texts_of,
    tokens_per_second,
)

from layertap_server.engine.device_attention import DeviceAttention
from layertap_server.engine.encoder import Encoder
from layertap_server.types import Output, Plan, Run

DTYPE = "bfloat16"


def kernels(at: Setting) -> None:
    """Says which kernels take the device's time in bulk, for texts of 128 tokens and of 8."""
    encoder = at.encoder(at.base, DTYPE)
    activity = torch.profiler.ProfilerActivity.CUDA if at.on_gpu else torch.profiler.ProfilerActivity.CPU
    for length in (128, 8):
        count = 4 if at.quick else at.batch_tokens * 4 // length
        batches = batches_of(texts_of([length] * count), pooled_of(encoder), "float32", at.batch_tokens)
        run_bulk(encoder, batches)
        with torch.profiler.profile(activities=[activity]) as profile:
            run_bulk(encoder, batches)
            if at.on_gpu:
                torch.cuda.synchronize()
        times = {
            one.key: (one.self_device_time_total if at.on_gpu else one.self_cpu_time_total, one.count)
            for one in profile.key_averages()
        }
        if not times:
            at.add(f"{length} tokens, kernels: the profiler saw none; it sees other threads on a GPU alone", "")
        total = sum(spent for spent, _ in times.values()) or 1
        for name, (spent, calls) in sorted(times.items(), key=lambda item: -item[1][0])[:10]:
            at.add(
                f"{length} tokens, kernel {name[:90]}", f"{spent / total:.1%}, {calls} launches, {spent / 1e3:.2f} ms"
            )


def host(at: Setting) -> None:
    """Measures what a batch costs the host, which two instances share one interpreter for, beside what it lasts."""
    encoder = at.encoder(at.base, DTYPE)
    encode = encoder.encode_beside()
    for length in (128, 40, 8):
        count = 4 if at.quick else at.batch_tokens // length
        run = Run(plan=Plan(outputs=(pooled_of(encoder),), dtype="float32"), texts=texts_of([length] * count))
        spent, lasted = [], []
        for _ in range(6):
            cpu, started = time.thread_time(), time.perf_counter()
            for _rows in encode([run]):
                pass
            spent.append((time.thread_time() - cpu) * 1e3)
            lasted.append((time.perf_counter() - started) * 1e3)
        figures = f"{statistics.median(spent[1:]):.2f} of {statistics.median(lasted[1:]):.2f}"
        at.add(f"host's ms of a batch of {count} texts of {length} tokens, of all its ms", figures)


def batch_sizes(at: Setting) -> None:
    encoder = at.encoder(at.base, DTYPE)
    texts = texts_of([128] * (8 if at.quick else 256 * 8))
    for label, output, dtype in (
        ("pooled", pooled_of(encoder), "float32"),
        ("all layers", all_layers_of(encoder), "float16"),
    ):
        sizes = (8192, 16_384, 32_768, 65_536)
        _side_by_side(
            at,
            f"--max-batch-tokens, {label}",
            {
                str(tokens): lambda tokens=tokens, output=output, dtype=dtype: tokens_per_second(
                    encoder, batches_of(texts, output, dtype, tokens), rounds=2
                )
                for tokens in sizes
            },
        )


def instances(at: Setting) -> None:
    encoder = at.encoder(at.base, DTYPE)
    batches = batches_of(
        texts_of([128] * (8 if at.quick else 256 * 12)), pooled_of(encoder), "float32", at.batch_tokens
    )
    _side_by_side(
        at,
        "instances of a device",
        {
            str(count): lambda count=count: tokens_per_second(encoder, batches, instances=count, rounds=2)
            for count in (1, 2, 3)
        },
    )


def attention(at: Setting) -> None:
    """Compares bounds under which texts run padded, for natural lengths and for short texts."""
    encoder = at.encoder(at.base, DTYPE)
    used = encoder._bert._attention
    if not isinstance(used, DeviceAttention) or used.varlen is None:
        at.add(f"attention: {at.device} has one way only", "")
        return
    chosen = used._padded_up_to
    lengths = [3 + n * n % 97 + (n % 40 == 0) * 380 for n in range(40 if at.quick else 12_000)]
    try:
        for label, batches in (
            ("mixed", batches_of(texts_of(lengths), pooled_of(encoder), "float32", at.batch_tokens)),
            ("8 tokens", batches_of(texts_of([8] * len(lengths)), pooled_of(encoder), "float32", at.batch_tokens)),
        ):
            ways: dict[str, Callable[[], float]] = {}
            for bound in (0, 8, 16, 64, 512):

                def rate(bound: int = bound, batches: list[list[Run]] = batches) -> float:
                    used._padded_up_to = bound
                    return tokens_per_second(encoder, batches, rounds=2)

                ways[f"{bound}{' (chosen)' * (bound == chosen)}"] = rate
            _side_by_side(at, f"texts run padded up to, {label}", ways)
    finally:
        used._padded_up_to = chosen


def small_batches(at: Setting) -> None:
    """Times single batches: up to 1,024 rows they may run as graphs, which a wanted early layer prevents."""
    encoder = at.encoder(at.base, DTYPE)
    for length in (4, 16, 64, 128, 256, 512):
        for label, texts in (("one text", texts_of([length])), ("four texts", texts_of([length // 2 + 1] * 4))):
            times = [_p50(at, encoder, texts, pooled_of(encoder))]
            deep = encoder._bert._graphs
            encoder._bert._graphs = None
            times.append(_p50(at, encoder, texts, pooled_of(encoder)))
            encoder._bert._graphs = deep
            what = f"{label}, longest {texts[0].token_count}, p50 ms, as is and launch by launch"
            at.add(what, f"{times[0]:.2f}, {times[1]:.2f}")


def lengths(at: Setting) -> None:
    encoder = at.encoder(at.base, DTYPE)
    for length in (4, 8, 16, 32, 64, 128, 256, 512):
        count = 4 if at.quick else at.batch_tokens * 4 // length
        batches = batches_of(texts_of([length] * count), pooled_of(encoder), "float32", at.batch_tokens)
        at.add(f"texts of {length} tokens, tokens/s", tokens_per_second(encoder, batches, rounds=2))


def dtypes(at: Setting) -> None:
    for dtype in ("float32", "float16") if at.on_gpu else ("float32",):
        at.release()
        encoder = at.encoder(at.base, dtype)
        batches = batches_of(
            texts_of([128] * (8 if at.quick else 256 * 4)), pooled_of(encoder), "float32", at.batch_tokens
        )
        at.add(f"{dtype}, ids to pooled, 128 tokens, tokens/s", tokens_per_second(encoder, batches, rounds=2))
        del encoder


def _p50(at: Setting, encoder: Encoder, texts: list, output: Output) -> float:
    run = Run(plan=Plan(outputs=(output,), dtype="float32"), texts=texts)
    times = []
    for _ in range(5 if at.quick else 30):
        started = time.perf_counter()
        list(encoder.encode([run]))
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[3:])


def _side_by_side(at: Setting, what: str, ways: dict[str, Callable[[], float]]) -> None:
    """Measures variants and names the best."""
    rates = {name: measure() for name, measure in ways.items()}
    best = max(rates, key=lambda name: rates[name])
    figures = ", ".join(f"{name}: {rate:,.0f}" for name, rate in rates.items())
    at.add(f"{what}, tokens/s; best {best}", figures)


if __name__ == "__main__":
    run_rows(globals())
