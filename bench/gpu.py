"""One command for a machine with a GPU: fidelity, the ceilings, then layertap beside its peers; prints a table.

Needs only torch, transformers, sentence-transformers, grpcio and protobuf beside this project: weights are dummies of
the bert-base and bert-large shapes and the vocabulary is made up, so that no model file has to travel. Run it as
`PYTHONPATH=client:server python bench/gpu.py`; `--device cpu --quick` tries the script where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from layertap import Client
from layertap_server.engine.encoder import Encoder
from layertap_server.model import checkpoint
from layertap_server.types import Output, OutputKind, Plan, Pool, Run, Strategy, Text

SHAPES = {"bert-base": (768, 12, 12), "bert-large": (1024, 24, 16), "tiny": (64, 3, 4)}
SERVE = (
    "import asyncio, sys; from layertap_server import app, cli; import os; "
    "server = app.App(cli.parse(sys.argv[1:], os.environ)); "
    "asyncio.run(server.serve(standard_services=False, ready=lambda address: print(address, flush=True)))"
)


def folder_of(scratch: Path, name: str) -> Path:
    """Writes a model folder: a configuration, a made-up vocabulary, dummy weights."""
    import safetensors.torch

    from layertap_server.engine.bert import dummy_weights

    hidden, layers, heads = SHAPES[name]
    words = [f"word{n}" for n in range(30522 - 5)]
    settings = {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "vocab_size": 30522,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
    }
    folder = scratch / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "model_max_length": 512})
    )
    safetensors.torch.save_file(dummy_weights(settings, 0), folder / "model.safetensors", {"format": "pt"})
    return folder


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def best(work: Callable[[], Any], device: str, rounds: int = 7) -> float:
    """Returns the median of the seconds a piece of work takes, after two runs that do not count."""
    times = []
    for turn in range(rounds + 2):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        if turn > 1:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def ceilings(device: str, quick: bool) -> tuple[float, float]:
    """Returns FLOP/s of a large bf16 matmul and bytes/s of a large copy into pinned host memory."""
    size = 512 if quick else 8192
    one, other = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    flops = 2 * size**3 / best(lambda: one @ other, device)
    count = (1 << 22) if quick else (1 << 30)
    source = torch.randn(count // 4, device=device)
    target = torch.empty(count // 4, pin_memory=device != "cpu")
    return flops, count / best(lambda: target.copy_(source, non_blocking=True), device)


def fidelity(folder: Path, device: str) -> list[str]:
    """Compares every layer with transformers in float32 on the CPU."""
    found = checkpoint.find(model_id=str(folder), revision="", name="", load_format="safetensors", seed=0)
    model = transformers.BertModel.from_pretrained(str(folder), attn_implementation="eager").eval()
    layers, hidden = found.settings["num_hidden_layers"], found.settings["hidden_size"]
    rng = np.random.default_rng(0)
    texts = [Text(rng.integers(5, 30000, n).astype(np.int32)) for n in (1, 5, 7, 7, 64, 200)]
    texts.append(Text(np.arange(10, 20, dtype=np.int32), attention_mask=np.array([0, 1] * 5, np.int32)))
    texts.append(Text(np.arange(10, 20, dtype=np.int32), attention_mask=np.zeros(10, np.int32)))
    everything = Output(kind=OutputKind.HIDDEN_STATES, layers=tuple(range(layers + 1)), row_size=hidden)
    lines = []
    for dtype in ("float32", "bfloat16") if device == "cpu" else ("float32", "bfloat16", "float16"):
        encoder = Encoder(found, device=device, dtype=dtype)
        got: dict[int, np.ndarray] = {}
        for rows in encoder.encode([Run(plan=Plan(outputs=(everything,), dtype="float32"), texts=texts)]):
            got[rows.layer] = np.frombuffer(rows.data, np.float32).reshape(-1, hidden)
        worst, least, end = 0.0, 1.0, 0
        for text in texts:
            mask = np.ones(text.token_count, np.int32) if text.attention_mask is None else text.attention_mask
            with torch.inference_mode():
                wanted = model(
                    input_ids=torch.from_numpy(text.input_ids[None]).long(),
                    attention_mask=torch.from_numpy(mask[None]).long(),
                    output_hidden_states=True,
                ).hidden_states
            for layer, states in enumerate(wanted):
                own, other = got[layer][end : end + text.token_count], states[0].numpy()
                worst = max(worst, float(np.abs(own - other).max()))
            a, b = own.mean(0), other.mean(0)
            least = min(least, float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
            end += text.token_count
        lines.append(f"| fidelity, {dtype} | largest difference {worst:.1e}, least pooled cosine {least:.6f} | |")
        del encoder
    return lines


def engine(folder: Path, device: str, quick: bool, flops: float, copy: float) -> list[str]:
    """Measures ids to pooled vectors, and ids to all layers, on the host, without gRPC."""
    found = checkpoint.find(model_id=str(folder), revision="", name="", load_format="safetensors", seed=0)
    encoder = Encoder(found, device=device, dtype="bfloat16")
    layers, hidden = found.settings["num_hidden_layers"], found.settings["hidden_size"]
    count, length = (4, 32) if quick else (256, 128)
    rng = np.random.default_rng(0)
    texts = [Text(rng.integers(5, 30000, length).astype(np.int32)) for _ in range(count)]
    pooled = Output(
        kind=OutputKind.POOLED_VECTORS, layers=(layers,), row_size=hidden, pool=Pool(strategy=Strategy.MEAN)
    )
    everything = Output(kind=OutputKind.HIDDEN_STATES, layers=tuple(range(layers + 1)), row_size=hidden)
    tokens = count * length
    work = tokens * layers * (24 * hidden**2 + 4 * length * hidden)
    lines = []
    for label, output, dtype in (("pooled", pooled, "float32"), ("all layers", everything, "float32")):
        run = Run(plan=Plan(outputs=(output,), dtype=dtype), texts=texts)
        seconds = best(lambda run=run: sum(len(rows.data) for rows in encoder.encode([run])), device)
        if label == "pooled":
            ratio = f"{work / seconds / flops:.2f} of the matmul ceiling"
        else:
            ratio = f"{tokens * (layers + 1) * hidden * 4 / seconds / copy:.2f} of the pinned-copy ceiling"
        lines.append(f"| {folder.name} engine, ids to {label}, bfloat16 | {tokens / seconds:,.0f} tokens/s | {ratio} |")
    return lines


def over_grpc(folder: Path, device: str, quick: bool) -> list[str]:
    """Measures texts to vectors over gRPC, in turn with sentence-transformers in this process."""
    import sentence_transformers as st
    from sentence_transformers.sentence_transformer import modules

    count = 20 if quick else 4000
    chosen = random.Random(0)
    texts = [" ".join(f"word{chosen.randrange(30000)}" for _ in range(126)) for _ in range(count)]
    flags = ["--port", "0", "--device", device, "--dtype", "bfloat16", "--model-id", str(folder)]
    flags += ["--max-queue-token-count", str(1 << 22)]
    server = subprocess.Popen([sys.executable, "-c", SERVE, *flags], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    address = server.stdout.readline().strip()
    words = modules.Transformer(str(folder), model_kwargs={"dtype": torch.bfloat16})
    model = st.SentenceTransformer(modules=[words, modules.Pooling(hidden_of(folder), "mean")], device=device)
    with Client(address) as client:

        def ours() -> None:
            assert sum(1 for _ in client.embed_stream(texts, pooling="mean")) == count

        theirs: dict[int, Callable[[], Any]] = {
            size: (lambda size=size: model.encode(texts, batch_size=size)) for size in (32, 128, 256)
        }
        size = min(theirs, key=lambda n: best(theirs[n], device, 1))
        pairs = [(best(ours, device, 1), best(theirs[size], device, 1)) for _ in range(3)]
    server.terminate()
    server.wait(timeout=60)
    seconds = statistics.median(a for a, _ in pairs)
    ratio = statistics.median(b / a for a, b in pairs)
    label = f"{ratio:.2f} times sentence-transformers (batch_size {size}, bfloat16) in process"
    return [f"| {folder.name} over gRPC, text to vectors, bfloat16 | {count / seconds:,.0f} texts/s | {label} |"]


def hidden_of(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["hidden_size"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--quick", action="store_true", help="a tiny model and little work, to try the script")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    arguments = parser.parse_args(argv)
    device = arguments.device
    flops, copy = ceilings(device, arguments.quick)
    name = torch.cuda.get_device_name(device) if device != "cpu" else "cpu"
    lines = [
        f"{name}, torch {torch.__version__}, transformers {transformers.__version__}",
        "",
        "| what | figure | ratio |",
        "|---|---|---|",
        f"| ceiling: bf16 matmul | {flops / 1e12:.1f} TFLOP/s | |",
        f"| ceiling: copy to pinned host memory | {copy / 1e9:.1f} GB/s | |",
    ]
    with tempfile.TemporaryDirectory() as made:
        for shape in ("tiny",) if arguments.quick else ("bert-base", "bert-large"):
            folder = folder_of(Path(made), shape)
            for part in (
                lambda: fidelity(folder, device),  # noqa: B023  # run before folder changes
                lambda: engine(folder, device, arguments.quick, flops, copy),  # noqa: B023
                lambda: over_grpc(folder, device, arguments.quick),  # noqa: B023
            ):
                lines += part()
                print(lines[-1], flush=True)
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
