"""What the three stages of the GPU benchmark share: models made here, the engine fed with ids, results written at once.

Weights are random ones of the bert-base and bert-large shapes and the vocabulary is made up, so no model has to travel.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import faulthandler
import functools
import gc
import json
import logging
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu import NO_DEVICE_CODE

from layertap_server.engine.encoder import Encoder
from layertap_server.model import checkpoint
from layertap_server.testing import ServerProcess, running_server
from layertap_server.types import Encode, Output, OutputKind, Plan, Pool, Run, Strategy, Text

SHAPES = {"bert-base": (768, 12, 12), "bert-large": (1024, 24, 16), "tiny": (64, 3, 4), "small": (128, 4, 4)}
VOCABULARY = 30522
ENGINE_RATE = "engine, ids to pooled, 128 tokens, tokens/s"
_SERVER_START_S = 65.0
"""How long a server may take to start: less than a row, so that the row can say why it did not."""
_WARM_S = 0.7
"""How long a ceiling is approached: an idle card's clocks are low."""
_CHOICES = ("layertap_server.engine.fast_path", "layertap_server.engine.graphs", "layertap_server.engine.runtime")
"""Who logs what the trials at start found."""
_CHOICE_WORDS = ("used (", "not used", "not available", "graphs:", "does not register")


@dataclasses.dataclass(kw_only=True, eq=False)
class Setting:
    """Where and how large a stage runs, and where its results go.

    Attributes:
        device: "cpu", or "cuda:N".
        quick: Whether to try the script with tiny shapes.
        results: The file of results, one line of JSON each.
        scratch: A folder for models.
        batch_tokens: Tokens of a batch of the engine.
        server_flags: More flags of the servers.
        ends_at: When the stage ends, by the monotonic clock, which all processes share.
        row: The row that runs.
        row_is_empty: Whether it has no result yet.
    """

    device: str
    quick: bool
    results: Path
    scratch: Path
    batch_tokens: int
    server_flags: list[str]
    ends_at: float
    row: str = ""
    row_is_empty: bool = True
    _encoder: tuple[str, str, Encoder] | None = None
    _server: tuple[tuple[str, ...], ServerProcess, contextlib.ExitStack] | None = None

    @property
    def base(self) -> str:
        """The model of most rows."""
        return "tiny" if self.quick else "bert-base"

    @property
    def large(self) -> str:
        """The larger model."""
        return "small" if self.quick else "bert-large"

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU."""
        return self.device != "cpu"

    def add(
        self,
        what: str,
        figure: float | str,
        *,
        ratio: float | None = None,
        required: float | None = None,
        aim: float | None = None,
        at_most: bool = False,
    ) -> None:
        """Writes one line of the results, at once: what follows may not be reached."""
        self.row_is_empty = False
        self._write(what=what, figure=figure, ratio=ratio, required=required, aim=aim, at_most=at_most)

    def starts(self, row: str) -> None:
        """Notes that a row starts, from which its time counts."""
        self.row, self.row_is_empty = row, True
        self._write(starts=True)

    def figure(self, what: str) -> float:
        """Returns the last figure of a name, perhaps of another process or an earlier run with the same results."""
        for line in reversed(self.results.read_text().splitlines()):
            found = json.loads(line)
            if found.get("what") == what:
                return float(found["figure"])
        raise LookupError(f"there is no figure yet: {what}; run its row too")

    def rate(self) -> float:
        """Returns the tokens/s of the engine for pooled texts of 128 tokens, measured here if no row has done so."""
        try:
            return self.figure(ENGINE_RATE)
        except LookupError:
            encoder = self.encoder(self.base, "bfloat16")
            length, count = (16, 64) if self.quick else (128, 256 * 24)
            batches = batches_of(texts_of([length] * count), pooled_of(encoder), "float32", self.batch_tokens)
            found = tokens_per_second(encoder, batches)
            self.add(ENGINE_RATE, found)
            return found

    def encoder(self, shape: str, dtype: str) -> Encoder:
        """Returns the engine on the device, as the server loads it; the last one is kept."""
        if self._encoder is None or self._encoder[:2] != (shape, dtype):
            self.release()
            self._encoder = shape, dtype, load(self, shape, dtype)
        return self._encoder[2]

    def server(self, *flags: str) -> ServerProcess:
        """Returns a server of the base model in bfloat16, and notes what its trials chose; the last one is kept."""
        if self._server is not None and self._server[0] == flags and self._server[1].process.poll() is None:
            return self._server[1]
        self.stop_server()
        self.release()
        own = ["--device", self.device, "--dtype", "bfloat16", "--model-id", str(folder_of(self, self.base))]
        started, stack = time.monotonic(), contextlib.ExitStack()
        server = stack.enter_context(
            running_server(*own, *flags, *self.server_flags, start_timeout_s=_SERVER_START_S, stop_timeout_s=10.0)
        )
        self._server = flags, server, stack
        self.add(f"start of a server ({' '.join(flags) or 'defaults'}), s", time.monotonic() - started)
        chosen = [line for line in server.log.splitlines() if any(word in line for word in _CHOICE_WORDS)]
        for line in dict.fromkeys(line.partition("layertap_server")[2] or line for line in chosen):
            self.add(f"{self.row}, chosen", line.strip())
        return server

    def stop_server(self) -> None:
        """Stops the server that is kept, if there is one."""
        if self._server is None:
            return
        flags, server, stack = self._server
        self._server = None
        try:
            stack.close()
        except Exception as exc:  # The rows that it served have their figures.
            server.kill()
            self.add(f"a server ({' '.join(flags)}) did not end well", f"{type(exc).__name__}: {str(exc)[-600:]}")

    def release(self) -> None:
        """Frees the engine that is kept, and its memory."""
        self._encoder = None
        _INSTANCES.clear()
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def _write(self, **line: Any) -> None:
        with self.results.open("a") as file:
            file.write(json.dumps({"row": self.row, **line}) + "\n")
        print(json.dumps(line), flush=True)


Row = Callable[[Setting], None]

_INSTANCES: dict[Encoder, list[Encode]] = {}
"""The instances of each encoder. They are kept: each has a queue of the device, and memory that goes with it."""


def run_rows(module: Mapping[str, Any]) -> None:
    """Runs the rows that the runner asks for, by their names in a module.

    A row that raises costs itself alone, unless the device is lost: then the process ends, and the runner starts
    another for the rows that follow.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--batch-tokens", type=int, default=32_768)
    parser.add_argument("--server-flags", default="")
    parser.add_argument("--rows", required=True)
    parser.add_argument("--ends-at", type=float, required=True)
    arguments = parser.parse_args()
    at = Setting(
        device=arguments.device,
        quick=arguments.quick,
        results=arguments.results,
        scratch=arguments.scratch,
        batch_tokens=arguments.batch_tokens,
        server_flags=arguments.server_flags.split(),
        ends_at=arguments.ends_at,
    )
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    for name in _CHOICES:
        logging.getLogger(name).setLevel(logging.DEBUG)  # Why a way is not available, with its traceback, in the log.
        logging.getLogger(name).addHandler(_Choices(at))
    faulthandler.register(signal.SIGUSR1)
    if why := _fault(at):
        at.add(f"no row can run: {at.device} does not work", why)
        sys.exit(NO_DEVICE_CODE)
    try:
        _run(at, module, arguments.rows.split(","))
    finally:
        at.stop_server()


def _run(at: Setting, module: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        at.starts(name)
        row: Row = module[name]
        try:
            row(at)
            if at.row_is_empty:
                at.add(f"{name}: nothing to measure on {at.device}", "")
        except Exception as exc:
            traceback.print_exc()
            at.add(f"{name} failed", f"{type(exc).__name__}: {str(exc).strip()[-600:]}")
            if _fault(at):
                sys.exit(3)


class _Choices(logging.Handler):
    """Writes what the trials of the engine chose, and why, beside the figures."""

    def __init__(self, at: Setting) -> None:
        super().__init__(logging.INFO)
        self._at = at

    def emit(self, record: logging.LogRecord) -> None:
        self._at.add(f"{self._at.row}, chosen", record.getMessage())


def _fault(at: Setting) -> str:
    """Returns why the device does not compute; empty: it does."""
    try:
        if at.on_gpu:
            torch.cuda.set_device(at.device)  # Events are of the current one.
        torch.ones(8, device=at.device).sum().item()
    except Exception as exc:
        return f"{type(exc).__name__}: {str(exc).strip()[:600]}"
    return ""


def folder_of(at: Setting, shape: str, *, weights: bool = True) -> Path:
    """Returns a model folder, made once: a configuration, a made-up vocabulary, and random weights if asked."""
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
    folder = at.scratch / shape
    if not folder.exists():
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(settings))
        words = [f"word{n}" for n in range(VOCABULARY - len(specials))]
        (folder / "vocab.txt").write_text("\n".join([*specials, *words]))
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "BertTokenizer", "model_max_length": 512})
        )
    file = folder / "model.safetensors"
    if weights and not file.exists():
        import safetensors.torch

        from layertap_server.engine.weight_reader import dummy_weights
        from layertap_server.model.settings import ModelSettings

        made = file.with_suffix(".made")  # A row that is stopped leaves no half of it.
        safetensors.torch.save_file(dummy_weights(ModelSettings.of(settings), 0), made, {"format": "pt"})
        made.replace(file)
    return folder


def load(at: Setting, shape: str, dtype: str) -> Encoder:
    """Returns the engine on the device, as the server loads it, with random weights."""
    folder = folder_of(at, shape, weights=shape == at.base)
    load_format = "safetensors" if shape == at.base else "dummy"
    found = checkpoint.find(model_id=str(folder), revision="", name="", load_format=load_format, seed=0)
    started = time.monotonic()
    encoder = Encoder(found, device=at.device, dtype=dtype)
    at.add(f"{shape}, {dtype}, loaded and tried, s", time.monotonic() - started)
    return encoder


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


def batches_of(texts: Sequence[Text], output: Output, dtype: str, tokens: int) -> list[list[Run]]:
    """Cuts texts into batches as the scheduler does: a prefix up to a budget of tokens."""
    batches: list[list[Text]] = [[]]
    left = tokens
    for text in texts:
        if text.token_count > left:
            batches.append([])
            left = tokens
        batches[-1].append(text)
        left -= text.token_count
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

    kept = _INSTANCES.setdefault(encoder, [])
    kept += [encoder.encode_beside() for _ in range(instances - len(kept))]
    threads = [threading.Thread(target=work, args=(encode,)) for encode in kept[:instances]]
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
    print(f"tokens/s of each round: {', '.join(f'{tokens / time:,.0f}' for time in times)}", flush=True)  # Is it noisy?
    return tokens / statistics.median(times[1:])


def flops_of(encoder: Encoder, length: int) -> float:
    """Returns the multiplications and additions of one token in a text of so many: products and attention, all blocks.

    Of one block, in hidden²: 6 for query, key and value, 2 for what follows attention, 16 for the two feed-forward
    products; and 2 · length · hidden each for scores and values. Embeddings, norms and pooling count as nothing.
    """
    hidden = encoder.hidden_size
    return float(encoder.layer_count * (24 * hidden**2 + 4 * length * hidden))


@functools.lru_cache(maxsize=1)
def matmul_rate(at: Setting) -> float:
    """Returns the most FLOP/s of a large matrix product in bfloat16, measured once in each process."""
    size = 256 if at.quick else 8192
    one, other = (torch.randn(size, size, device=at.device).bfloat16() for _ in range(2))
    return 2 * size**3 / _seconds(at, lambda: one @ other)


@functools.lru_cache(maxsize=1)
def copy_rate(at: Setting) -> float:
    """Returns the most bytes/s of large copies into pinned host memory, measured once in each process."""
    byte_count = 1 << 20 if at.quick else 1 << 30
    source = torch.zeros(byte_count, dtype=torch.uint8, device=at.device)
    target = torch.empty(byte_count, dtype=torch.uint8, pin_memory=at.on_gpu)
    return byte_count / _seconds(at, lambda: target.copy_(source, non_blocking=True))


def _seconds(at: Setting, work: Callable[[], object]) -> float:
    """Returns how long the device takes for some work at its best, which is what ratios are to."""
    warm_until = time.monotonic() + (0.0 if at.quick else _WARM_S)
    while time.monotonic() < warm_until:
        _timed(at, work)
    return min(_timed(at, work) for _ in range(5))


def _timed(at: Setting, work: Callable[[], object], repeats: int = 10) -> float:
    """Returns the seconds of one of several runs, by the device's own clock."""
    if not at.on_gpu:
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        return (time.perf_counter() - started) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / repeats
