"""The peers, each at the best settings that a short trial on its first texts finds.

Runs in the environment of peers.txt. Every peer gets the same: the model's folder, texts, and the length they are cut
to. All but sentence-transformers, which sorts and batches by itself, run over batches of similar length below a budget
of tokens, in as many threads as they like.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import worker

CORES = 2
BUDGETS = (512, 1024, 2048, 4096)


def load_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    loaded = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    loaded.no_padding()
    return loaded


def batches(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Yields texts by descending length, as many at once as the budget has room for when padded."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        count = max(1, budget // int(lengths[order[start]]))
        yield order[start : start + count]
        start += count


def pad(ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, ids))
    padded, mask = np.zeros((len(ids), width), np.int64), np.zeros((len(ids), width), np.int64)
    for row, own in enumerate(ids):
        padded[row, : len(own)] = own
        mask[row, : len(own)] = 1
    return padded, mask


def mean(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    weights = (mask / mask.sum(1, keepdims=True)).astype(np.float32)
    return np.einsum("nlh,nl->nh", hidden, weights)


class Batched:
    """A peer that turns padded batches into hidden states; tries its settings before it is first timed."""

    def __init__(
        self, folder: Path, settings: list[dict[str, Any]], make: Callable[..., Callable[..., np.ndarray]]
    ) -> None:
        self._tokenizer = load_tokenizer(folder)
        self._settings, self._make = settings, make
        self._chosen: dict[int, tuple[dict[str, Any], int]] = {}
        self._made: dict[int, Any] = {}
        self._last = ""

    def __call__(self, texts: list[str], max_length: int) -> np.ndarray:
        key = hash((texts[0], max_length, len(texts)))
        if key not in self._chosen:
            self._chosen[key] = self._best(texts[: len(texts) // 4], max_length)
        setting, budget = self._chosen[key]
        self._last = f"{setting}, {budget} tokens a batch"
        return self._run(texts, max_length, setting, budget)

    def describe(self) -> str:
        return self._last

    def _best(self, texts: list[str], max_length: int) -> tuple[dict[str, Any], int]:
        times = {}
        for number, budget in itertools.product(range(len(self._settings)), BUDGETS):
            taken = []
            for _ in range(2):
                started = time.perf_counter()
                self._run(texts, max_length, self._settings[number], budget)
                taken.append(time.perf_counter() - started)
            times[number, budget] = min(taken)
        number, budget = min(times, key=times.__getitem__)
        return self._settings[number], budget

    def _run(self, texts: list[str], max_length: int, setting: dict[str, Any], budget: int) -> np.ndarray:
        key = self._settings.index(setting)
        if key not in self._made:
            self._made[key] = self._make(**setting)
        self._tokenizer.enable_truncation(max_length)
        ids = [one.ids for one in self._tokenizer.encode_batch(texts)]
        lengths = np.array([len(one) for one in ids])
        vectors: dict[int, np.ndarray] = {}

        def one(chosen: np.ndarray) -> None:
            padded, mask = pad([ids[n] for n in chosen])
            for n, vector in zip(chosen, mean(self._made[key](padded, mask), mask), strict=True):
                vectors[int(n)] = vector

        with ThreadPoolExecutor(setting["at_once"]) as pool:
            list(pool.map(one, batches(lengths, budget)))
        return np.stack([vectors[n] for n in range(len(texts))])


def export_onnx(folder: Path, attention: str = "sdpa") -> Path:
    path = folder.parent / f"{folder.name}.{attention}.onnx"
    if not path.exists():
        import torch
        import transformers

        model = transformers.BertModel.from_pretrained(str(folder), attn_implementation=attention).eval()

        class Last(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, input_ids: Any, attention_mask: Any) -> Any:
                return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

        example = torch.ones(2, 9, dtype=torch.int64)
        torch.onnx.export(
            Last(),
            (example, example),
            str(path),
            input_names=["input_ids", "attention_mask"],
            output_names=["last_hidden_state"],
            dynamic_axes={"input_ids": {0: "n", 1: "l"}, "attention_mask": {0: "n", 1: "l"}},
            opset_version=17,
            dynamo=False,
        )
    return path


def onnxruntime(folder: Path) -> Batched:
    import onnxruntime as ort

    path = export_onnx(folder)
    optimized = folder.parent / f"{folder.name}.optimized.onnx"
    if not optimized.exists():
        from onnxruntime.transformers import optimizer

        # The fusions that onnxruntime recommends for BERT: attention, layer norm, GELU.
        plain = str(export_onnx(folder, "eager"))
        settings = json.loads((folder / "config.json").read_text())
        heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
        made = optimizer.optimize_model(plain, model_type="bert", num_heads=heads, hidden_size=hidden, opt_level=1)
        made.save_model_to_file(str(optimized))

    def make(at_once: int, fused: bool) -> Callable[..., np.ndarray]:
        options = ort.SessionOptions()
        options.intra_op_num_threads = CORES // at_once
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        session = ort.InferenceSession(str(optimized if fused else path), options, providers=["CPUExecutionProvider"])

        def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
            feeds = {"input_ids": ids, "attention_mask": mask}
            wanted = {one.name: one.type for one in session.get_inputs()}
            return session.run(None, {k: v.astype(np.int32) if "32" in wanted[k] else v for k, v in feeds.items()})[0]

        return run

    return Batched(folder, [{"at_once": n, "fused": fused} for n in (1, 2) for fused in (False, True)], make)


def openvino(folder: Path) -> Batched:
    import openvino as ov

    core = ov.Core()
    model = core.read_model(str(export_onnx(folder)))

    def make(at_once: int) -> Callable[..., np.ndarray]:
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "NUM_STREAMS": str(at_once),
            "INFERENCE_NUM_THREADS": str(CORES),
        }
        compiled = core.compile_model(model, "CPU", settings)

        def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
            request = compiled.create_infer_request()
            return request.infer({"input_ids": ids, "attention_mask": mask})[0]

        return run

    return Batched(folder, [{"at_once": 1}, {"at_once": 2}], make)


def ctranslate2(folder: Path) -> Batched:
    import ctranslate2 as ct2

    target = folder.parent / f"{folder.name}.ct2"
    if not target.exists():
        ct2.converters.TransformersConverter(str(folder)).convert(str(target))

    def make(at_once: int) -> Callable[..., np.ndarray]:
        encoder = ct2.Encoder(
            str(target), device="cpu", compute_type="float32", inter_threads=at_once, intra_threads=CORES // at_once
        )

        def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
            lengths = ct2.StorageView.from_array(mask.sum(1).astype(np.int32))
            return np.array(
                encoder.forward_batch(ct2.StorageView.from_array(ids.astype(np.int32)), lengths).last_hidden_state
            )

        return run

    return Batched(folder, [{"at_once": 1}, {"at_once": 2}], make)


class SentenceTransformers:
    """sentence-transformers' own encode, at the best of its batch sizes."""

    def __init__(self, folder: Path) -> None:
        import sentence_transformers as st
        import torch
        from sentence_transformers.sentence_transformer import modules

        torch.set_num_threads(CORES)
        words = modules.Transformer(str(folder))
        self._model = st.SentenceTransformer(
            modules=[words, modules.Pooling(words.get_embedding_dimension(), "mean")], device="cpu"
        )
        self._sizes: dict[int, int] = {}
        self._last = ""

    def __call__(self, texts: list[str], max_length: int) -> np.ndarray:
        self._model.max_seq_length = max_length
        key = hash((texts[0], max_length))
        if key not in self._sizes:
            times = {}
            for size in (8, 16, 32, 64):
                started = time.perf_counter()
                self._model.encode(texts[: len(texts) // 4], batch_size=size)
                times[size] = time.perf_counter() - started
            self._sizes[key] = min(times, key=times.__getitem__)
        self._last = f"batch_size {self._sizes[key]}"
        return self._model.encode(texts, batch_size=self._sizes[key])

    def describe(self) -> str:
        return self._last


class TransformersLoop:
    """The loop of a notebook: padded batches in the order of the texts, all hidden states of each kept as numpy."""

    SIZES = (8, 16, 32)

    def __init__(self, folder: Path) -> None:
        import torch
        import transformers

        torch.set_num_threads(CORES)
        self._torch = torch
        self._model = transformers.BertModel.from_pretrained(str(folder)).eval()
        self._tokenizer = load_tokenizer(folder)
        self._size = 0

    def __call__(self, texts: list[str], max_length: int) -> np.ndarray:
        self._tokenizer.enable_truncation(max_length)
        if not self._size:
            times = {}
            for size in self.SIZES:
                started = time.perf_counter()
                self._loop(texts[: len(texts) // 4], size)
                times[size] = time.perf_counter() - started
            self._size = min(times, key=times.__getitem__)
        return self._loop(texts, self._size)

    def _loop(self, texts: list[str], size: int) -> np.ndarray:
        vectors = []
        for start in range(0, len(texts), size):
            ids, mask = pad([one.ids for one in self._tokenizer.encode_batch(texts[start : start + size])])
            with self._torch.inference_mode():
                out = self._model(
                    input_ids=self._torch.from_numpy(ids),
                    attention_mask=self._torch.from_numpy(mask),
                    output_hidden_states=True,
                )
                layers = [layer.numpy() for layer in out.hidden_states]
            vectors.append(mean(layers[-1], mask))
        return np.concatenate(vectors)

    def describe(self) -> str:
        return f"batch size {self._size}"


PEERS: dict[str, Callable[[Path], Any]] = {
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "ctranslate2": ctranslate2,
    "sentence-transformers": SentenceTransformers,
    "transformers": TransformersLoop,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    peer = PEERS[arguments.peer](arguments.folder)
    worker.serve(peer, peer.describe)
    sys.exit(0)
