"""What the three stages of the GPU benchmark share: models made here, the engine fed with ids, results written at once.

Weights are random ones of the bert-base and bert-large shapes and the vocabulary is made up, so no model has to travel.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layertap_server.engine.encoder import Encoder
from layertap_server.model import checkpoint
from layertap_server.types import Output, OutputKind, Plan, Pool, Run, Strategy, Text

SHAPES = {"bert-base": (768, 12, 12), "bert-large": (1024, 24, 16), "tiny": (64, 3, 4)}
VOCABULARY = 30522
BATCH_TOKENS = 32_768


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where and how large a stage runs; `quick` tries the script with tiny shapes."""

    device: str
    quick: bool
    results: Path

    @property
    def shapes(self) -> Sequence[str]:
        return ["tiny"] if self.quick else ["bert-base", "bert-large"]

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def add(self, what: str, figure: float | str, *, ratio: float | None = None, required: float | None = None) -> None:
        """Writes one line of the results, at once: what follows may not be reached."""
        line = {"what": what, "figure": figure, "ratio": ratio, "required": required}
        with self.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def setting() -> Setting:
    """Reads the arguments that the runner gives to every stage."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()
    return Setting(device=arguments.device, quick=arguments.quick, results=arguments.results)


def folder_of(scratch: Path, shape: str) -> Path:
    """Writes a model folder: a configuration, a made-up vocabulary, random weights."""
    import safetensors.torch

    from layertap_server.engine.weight_reader import dummy_weights
    from layertap_server.model.settings import ModelSettings

    hidden, layers, heads = SHAPES[shape]
    settings = {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
    }
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    folder = scratch / shape
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    words = [f"word{n}" for n in range(VOCABULARY - len(specials))]
    (folder / "vocab.txt").write_text("\n".join([*specials, *words]))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "model_max_length": 512})
    )
    safetensors.torch.save_file(
        dummy_weights(ModelSettings.of(settings), 0), folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def load(folder: Path, device: str, dtype: str) -> Encoder:
    """Returns the engine on a device, as the server loads it."""
    found = checkpoint.find(model_id=str(folder), revision="", name="", load_format="safetensors", seed=0)
    return Encoder(found, device=device, dtype=dtype)


def texts_of(lengths: Sequence[int], seed: int = 0) -> list[Text]:
    random = np.random.default_rng(seed)
    return [Text(random.integers(5, VOCABULARY, length).astype(np.int32)) for length in lengths]


def pooled_of(encoder: Encoder) -> Output:
    return Output(
        kind=OutputKind.POOLED_VECTORS,
        layers=(encoder.layer_count,),
        row_size=encoder.hidden_size,
        pool=Pool(strategy=Strategy.MEAN),
    )


def all_layers_of(encoder: Encoder) -> Output:
    return Output(
        kind=OutputKind.HIDDEN_STATES, layers=tuple(range(encoder.layer_count + 1)), row_size=encoder.hidden_size
    )


def batches_of(texts: Sequence[Text], output: Output, dtype: str, tokens: int = BATCH_TOKENS) -> list[list[Run]]:
    """Cuts texts into batches as the scheduler does: a prefix up to a budget of tokens."""
    batches: list[list[Text]] = [[]]
    for text in texts:
        if sum(one.token_count for one in batches[-1]) + text.token_count > tokens:
            batches.append([])
        batches[-1].append(text)
    plan = Plan(outputs=(output,), dtype=dtype)
    return [[Run(plan=plan, texts=batch)] for batch in batches]


def run_bulk(encoder: Encoder, batches: Sequence[list[Run]], *, instances: int = 2) -> float:
    """Returns the seconds that instances need for all batches, each taking the next one."""
    left: Iterator[list[Run]] = iter(batches)
    lock = threading.Lock()
    failed: list[BaseException] = []

    def work(encode: Callable[[list[Run]], Iterator[Any]]) -> None:
        try:
            while True:
                with lock:
                    batch = next(left, None)
                if batch is None:
                    return
                for _ in encode(batch):
                    pass
        except BaseException as exc:
            failed.append(exc)

    threads = [threading.Thread(target=work, args=(encoder.encode_beside(),)) for _ in range(instances)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return time.perf_counter() - started


def tokens_per_second(encoder: Encoder, batches: Sequence[list[Run]], *, instances: int = 2, rounds: int = 3) -> float:
    """Returns the median rate of several rounds, after one that does not count."""
    tokens = sum(text.token_count for batch in batches for run in batch for text in run.texts)
    times = [run_bulk(encoder, batches, instances=instances) for _ in range(rounds + 1)]
    return tokens / statistics.median(times[1:])


def flops_of(encoder: Encoder, length: int) -> float:
    """Returns the multiplications and additions of one token in a text of so many, all blocks."""
    hidden = encoder.hidden_size
    return float(encoder.layer_count * (24 * hidden**2 + 4 * length * hidden))


def ceilings(at: Setting) -> tuple[float, float]:
    """Returns FLOP/s of a large bf16 matrix product and bytes/s of large copies into pinned host memory."""
    size, byte_count = (256, 1 << 20) if at.quick else (8192, 1 << 30)
    one, other = (torch.randn(size, size, device=at.device).bfloat16() for _ in range(2))
    source = torch.zeros(byte_count, dtype=torch.uint8, device=at.device)
    target = torch.empty(byte_count, dtype=torch.uint8, pin_memory=at.on_gpu)
    product = _seconds(at, lambda: one @ other)
    copy = _seconds(at, lambda: target.copy_(source, non_blocking=True))
    return 2 * size**3 / product, byte_count / copy


def _seconds(at: Setting, work: Callable[[], object], rounds: int = 10) -> float:
    times = []
    for _ in range(rounds + 3):
        _synchronize(at)
        started = time.perf_counter()
        work()
        _synchronize(at)
        times.append(time.perf_counter() - started)
    return statistics.median(times[3:])


def _synchronize(at: Setting) -> None:
    if at.on_gpu:
        torch.cuda.synchronize()
