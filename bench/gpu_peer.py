"""sentence-transformers at its best on a GPU: tries ways, then answers each line it reads with the seconds of one run.

A process of its own, as its users have it: the engine changes settings of torch.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import sentence_transformers
import torch
from sentence_transformers.sentence_transformer import modules


def main() -> None:
    folder, file, device = sys.argv[1:]
    texts = Path(file).read_text().splitlines()
    dtype = torch.float32 if device == "cpu" else torch.float16
    found: dict[str, tuple[float, sentence_transformers.SentenceTransformer, int]] = {}
    for attention in ("sdpa", "flash_attention_2"):
        try:
            words = modules.Transformer(folder, model_kwargs={"dtype": dtype, "attn_implementation": attention})
            pooling = modules.Pooling(words.get_embedding_dimension(), "mean")
            model = sentence_transformers.SentenceTransformer(modules=[words, pooling], device=device)
            model.encode(texts[:64])
            for size in (32, 128, 512):
                _seconds(model, texts[: len(texts) // 4], size)
                label = f"{attention}, batches of {size}"
                found[label] = (_seconds(model, texts, size), model, size)
                print(f"tried {label}: {len(texts) / found[label][0]:.0f} texts/s", flush=True)
        except Exception as exc:  # Its packages, or the device, may lack it.
            print(f"tried {attention}: not available, {type(exc).__name__}", flush=True)
    best = min(found, key=lambda label: found[label][0])
    print(best, flush=True)
    _, model, size = found[best]
    for _ in sys.stdin:
        print(_seconds(model, texts, size), flush=True)


def _seconds(model: sentence_transformers.SentenceTransformer, texts: list[str], size: int) -> float:
    started = time.perf_counter()
    model.encode(texts, batch_size=size, show_progress_bar=False)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
