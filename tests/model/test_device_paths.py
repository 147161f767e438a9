"""The engine's paths for an accelerator, on a stand-in for one: nothing waits and nothing is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from support import family
from support.device_runs import (
    ALL_LAYERS,
    EVERY_OUTPUT,
    HIDDEN_SIZE,
    LAYER_COUNT,
    check_agrees,
    layers_of,
    output_of,
    run_of,
    sentences_in,
    text_of,
)
from support.oracle import Oracle
from support.simulated_gpu import SimulatedGpu, TransferCount, fake_cuda
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from layertap_server.engine.encoder import Encoder
from layertap_server.engine.upload import Upload
from layertap_server.model import checkpoint, sentence_modules
from layertap_server.model.checkpoint import Checkpoint
from layertap_server.model.sentence_config import SentenceConfig
from layertap_server.parity.compare import BOUNDS
from layertap_server.types import (
    Output,
    OutputKind,
    Plan,
    Pool,
    Rows,
    Run,
    Strategy,
    Text,
    Windows,
    Words,
)

OF_MODULES = [
    output_of(OutputKind.HIDDEN_STATES, LAYER_COUNT, applies_modules=True),
    output_of(
        OutputKind.POOLED_VECTORS,
        LAYER_COUNT,
        size=5,
        pool=Pool(strategy=Strategy.MEAN, normalize=True),
        applies_modules=True,
    ),
]


def _long_text() -> Text:
    """Returns a text that runs as windows, with words and spans that lie in several."""
    return dataclasses.replace(
        text_of(50, words=True),
        words=Words(
            starts=np.array([1, 20, 0]),
            piece_counts=np.array([19, 29, 0]),
            offsets=np.zeros((3, 2), np.int64),
            first_word_count=3,
        ),
        windows=Windows(token_count=50, max_length=16, stride=5, prefix_count=1, suffix_count=1),
    )


def _of_windows(outputs: Sequence[Output]) -> Plan:
    """Returns the plan of windows for all outputs that windows may have."""
    fitting = tuple(
        dataclasses.replace(output, pooled_size=HIDDEN_SIZE if output.applies_modules else output.row_size)
        if output.pool
        else output
        for output in outputs
        if output.kind is not OutputKind.ATTENTIONS
    )
    plan = Plan(outputs=fitting, dtype="bfloat16").with_windows().of_windows
    assert plan is not None
    return plan


@pytest.mark.parametrize(
    ("device", "dtype", "prefers_fast"),
    [
        ("meta", "float32", False),
        ("meta", "bfloat16", False),
        ("meta", "bfloat16", True),
        ("cuda:0", "float32", False),
        ("cuda:0", "float16", True),
    ],
)
def test_a_batch_is_one_upload_and_nothing_waits_for_the_device(
    tiny_model: Checkpoint,
    device: str,
    dtype: str,
    prefers_fast: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sentences = sentences_in(tmp_path)
    with fake_cuda(monkeypatch) if device != "meta" else contextlib.nullcontext():
        _runs_without_waiting(tiny_model, device, dtype, prefers_fast, sentences)


def _runs_without_waiting(
    tiny_model: Checkpoint, device: str, dtype: str, prefers_fast: bool, sentences: SentenceConfig
) -> None:
    gpu = SimulatedGpu(device, prefers_fast=prefers_fast)
    encoder = Encoder(tiny_model, device=device, dtype=dtype, runtime=gpu, sentences=sentences)
    long = _long_text()
    windows = Run(
        plan=_of_windows([*EVERY_OUTPUT, *OF_MODULES]), texts=[long.part(n) for n in range(long.window_count)]
    )
    masked = [text_of(9, mask=[1, 0] * 4 + [1]), text_of(5, mask=[0] * 5)]
    for texts in (
        [text_of(4, words=True)],
        [text_of(n, words=True, types=n % 2 == 0) for n in (3, 3, 40, 200)] + masked,
    ):
        texts = [text if text.words else text_of(7, words=True) for text in texts]
        batch = [
            run_of(texts, *EVERY_OUTPUT, *OF_MODULES),
            run_of(
                masked,
                output_of(OutputKind.HIDDEN_STATES, 1),
                output_of(OutputKind.ATTENTIONS, 1, size=4, heads=(0, 1, 2, 3)),
            ),
            windows,
            run_of(texts[:1], ALL_LAYERS, dtype="float16"),
        ]
        uploads = gpu.uploads
        with TransferCount(gpu.device.type) as count:
            found = list(encoder.encode(batch))
        assert gpu.uploads == uploads + 1
        assert count.operators > 50
        assert len(found) == sum(len(output.layers) for run in batch for output in run.plan.outputs)


def _kept(part: Text) -> range:
    assert part.window is not None
    return part.window.kept


def test_windows_give_their_rows_and_parts_of_what_is_made_of_them(encoder: Encoder) -> None:
    whole, plan = _long_text(), _of_windows(EVERY_OUTPUT)
    parts = [whole.part(n) for n in range(whole.window_count)]
    batch = [run_of([text_of(9)], ALL_LAYERS), Run(plan=plan, texts=parts)]
    found = {(rows.output_index, rows.layer): rows for rows in encoder.encode(batch) if rows.run_index == 1}
    alone = layers_of(encoder, [Text(part.input_ids) for part in parts])
    starts = np.cumsum([0, *(part.token_count for part in parts)])
    for index, output in enumerate(plan.outputs):
        for layer in output.layers:
            rows = found[index, layer]
            assert not rows.failures
            if output.kind is OutputKind.HIDDEN_STATES and output.mix is None:
                bits = np.frombuffer(rows.data, np.uint16).astype(np.uint32) << 16
                kept = [start + row for start, part in zip(starts, parts, strict=False) for row in _kept(part)]
                assert np.abs(bits.view(np.float32).reshape(50, -1) - alone[layer][kept]).max() < BOUNDS["bfloat16"]
            elif output.is_part:
                values = np.frombuffer(rows.data, np.float32).reshape(-1, output.row_size)
                assert len(values) == sum(output.row_counts(parts)) and np.isfinite(values).all()


def test_modules_of_joined_vectors_run_on_the_device(tiny_model: Checkpoint, tmp_path: Path) -> None:
    gpu, sentences = SimulatedGpu(), sentences_in(tmp_path)
    pooled = np.random.default_rng(0).standard_normal((3, HIDDEN_SIZE), np.float32)
    encoders = [
        Encoder(tiny_model, device="cpu", dtype="float32", runtime=runtime, sentences=sentences)
        for runtime in (gpu, None)
    ]
    uploads = gpu.uploads
    found, wanted = (encoder.apply_modules(pooled.copy()) for encoder in encoders)
    assert gpu.uploads == uploads + 1 and found.shape == (3, 5)
    np.testing.assert_allclose(found, wanted, atol=BOUNDS["float32"])


def test_the_count_sees_what_it_is_for() -> None:
    numbers = torch.zeros(3, device="meta")
    with TransferCount("meta"):
        with pytest.raises(AssertionError, match="mixes"):
            torch.zeros(3).to("meta")
        with pytest.raises(AssertionError, match="waits"):
            float(numbers.sum())


@pytest.mark.parametrize("varlen", [False, True], ids=["padded", "variable-length"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_way_of_attention_gives_what_transformers_gives(
    tiny_model: Checkpoint, tiny_oracle: Oracle, dtype: str, varlen: bool
) -> None:
    encoder = Encoder(tiny_model, device="cpu", dtype=dtype, runtime=SimulatedGpu(varlen=varlen))
    lengths = [1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 127, 128, 129, 200, 256]
    texts = [text_of(length, types=length % 2 == 0) for length in lengths]
    masks = [[1, 0, 1, 1, 0], [0] * 6, [0, 1], [1] * 30 + [0] * 3]
    texts += [text_of(len(mask), mask=mask) for mask in masks]
    check_agrees(encoder, texts, tiny_oracle, BOUNDS[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [kind for kind in family.TOKENIZERS if kind != "bert"])
def test_every_model_type_gives_what_transformers_gives(tmp_path: Path, kind: str, dtype: str) -> None:
    folder = family.save(kind, tmp_path, spread=0.1)
    found = checkpoint.find(model_id=str(folder), revision="", name="", load_format="safetensors", seed=0)
    dense = sentence_modules.Dense(
        of_tokens=True,
        in_size=HIDDEN_SIZE,
        out_size=3,
        has_bias=True,
        activation="Tanh",
        has_residual=False,
        weights=tmp_path / "dense.safetensors",
        digest="",
    )
    weights = {"linear.weight": torch.randn(3, HIDDEN_SIZE), "linear.bias": torch.randn(3)}
    safetensors.torch.save_file(weights, dense.weights)
    sentences = SentenceConfig(max_length=64, token_modules=(dense, sentence_modules.Normalize(of_tokens=True)))
    gpu = SimulatedGpu(prefers_fast=False)
    encoder = Encoder(found, device="cpu", dtype=dtype, runtime=gpu, sentences=sentences)
    random, pad = np.random.default_rng(0), found.settings.pad_token_id
    ids = [random.integers(0, found.settings.vocab_size, count).astype(np.int32) for count in (1, 5, 5, 60)]
    ids.append(np.array([7, pad, 8, pad], np.int32))
    texts = [Text(one) for one in ids] + [Text(ids[1], attention_mask=np.array([1, 0, 1, 1, 0], np.int32))]
    oracle = Oracle.load(folder)
    check_agrees(encoder, texts[:5], oracle, BOUNDS[dtype])
    check_agrees(encoder, texts, oracle, BOUNDS[dtype])
    rows_output = output_of(OutputKind.HIDDEN_STATES, LAYER_COUNT, size=3, applies_modules=True)
    pool = Pool(strategy=Strategy.MEAN)
    vector_output = output_of(OutputKind.POOLED_VECTORS, LAYER_COUNT, size=3, pool=pool, applies_modules=True)
    uploads = gpu.uploads
    rows, vectors = (
        np.frombuffer(one.data, np.float32).reshape(-1, 3)
        for one in encoder.encode([run_of(texts[:5], rows_output, vector_output)])
    )
    assert gpu.uploads == uploads + 1
    last = torch.from_numpy(np.concatenate([oracle.run(text.input_ids)[0][-1] for text in texts[:5]]))
    wanted = F.normalize(torch.tanh(last @ weights["linear.weight"].T + weights["linear.bias"]), dim=1)
    assert np.abs(rows - wanted.numpy()).max() <= 2 * BOUNDS[dtype]
    counts = [text.token_count for text in texts[:5]]
    means = np.stack([part.mean(0) for part in np.split(wanted.numpy(), np.cumsum(counts)[:-1])])
    assert np.abs(vectors - means).max() <= 2 * BOUNDS[dtype]


def test_host_memory_is_lent_again_only_when_nothing_reads_it(tiny_model: Checkpoint, tiny_oracle: Oracle) -> None:
    gpu = SimulatedGpu()
    encoder = Encoder(tiny_model, device="cpu", dtype="float32", runtime=gpu)
    kept: list[Rows] = []
    for length in (30, 30, 31):
        kept += encoder.encode([run_of([text_of(length)], ALL_LAYERS)])
    for rows, length in zip(kept, [30] * 4 + [30] * 4 + [31] * 4, strict=True):
        wanted, _ = tiny_oracle.run(text_of(length).input_ids, None, None)
        found = np.frombuffer(rows.data, np.float32).reshape(-1, HIDDEN_SIZE)
        np.testing.assert_allclose(found, wanted[rows.layer], atol=BOUNDS["float32"])


class _Casts(TorchDispatchMode):
    """Counts the tensors that were cast to bfloat16."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default):
            self.count += found.dtype is torch.bfloat16 and args[0].dtype is torch.float32
        return found


def test_rows_are_cast_once_where_every_layer_is_wanted(tiny_model: Checkpoint) -> None:
    gpu = SimulatedGpu(prefers_fast=False, varlen=False)
    encoder = Encoder(tiny_model, device="cpu", dtype="bfloat16", runtime=gpu)
    with _Casts() as casts:
        layers_of(encoder, [text_of(5), text_of(9)])
    assert casts.count == 1 + 2 * LAYER_COUNT  # Layer 0, and after each of a block's two LayerNorms.


def test_an_upload_keeps_shapes_and_dtypes() -> None:
    arrays = [
        np.arange(5, dtype=np.int32),
        np.zeros((0, 3), np.int64),
        np.array([[True, False]]),
        np.arange(6, dtype=np.float32).reshape(2, 3)[:, ::2],
        np.array([2**40]),
    ]
    gpu = SimulatedGpu()
    upload = Upload(gpu)
    sent = [upload.add(array) for array in arrays]
    upload.send()
    for array, one in zip(arrays, sent, strict=True):
        np.testing.assert_array_equal(one.tensor.numpy(), array)
        assert one.tensor.numpy().dtype == array.dtype
    assert gpu.uploads == 1
    upload.wait()


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
def test_rows_that_runs_ask_for_alike_come_into_the_buffers_of_each(
    tiny_model: Checkpoint, encoder: Encoder, on_gpu: bool
) -> None:
    places: dict[tuple[int, int], memoryview] = {}

    def allocate(first_text: int, output_index: int, layer: int, byte_count: int) -> memoryview:
        return places.setdefault((first_text, layer), memoryview(bytearray(byte_count)))

    plan = Plan(outputs=(ALL_LAYERS,), dtype="float32")
    batch = [
        Run(plan=plan, texts=[text_of(3 + n)], first_text=n, allocator=allocate if n < 2 else None) for n in (0, 1, 2)
    ]
    found = list((encoder if on_gpu else Encoder(tiny_model, device="cpu", dtype="float32")).encode(batch))
    assert len(found) == 3 * (LAYER_COUNT + 1)
    for rows in found:
        assert rows.data.nbytes == (3 + rows.run_index) * HIDDEN_SIZE * 4 and any(rows.data)
        assert (rows.data is places.get((rows.run_index, rows.layer))) == (rows.run_index < 2)
