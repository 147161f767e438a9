"""The engine's paths for an accelerator, on a stand-in for one: nothing waits and nothing is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from support import family
from support.oracle import Oracle
from support.simulated_gpu import SimulatedGpu, TransferCount, fake_cuda
from torch.nn import functional as F

from layertap_server.engine.device_attention import DeviceAttention
from layertap_server.engine.encoder import Encoder
from layertap_server.engine.fast_path import tried
from layertap_server.engine.upload import Upload
from layertap_server.model import checkpoint, sentence_modules
from layertap_server.model.checkpoint import Checkpoint
from layertap_server.model.sentence_config import SentenceConfig
from layertap_server.parity.compare import BOUNDS
from layertap_server.types import (
    Mix,
    Mixing,
    Output,
    OutputKind,
    Plan,
    Pool,
    Rows,
    Run,
    Spans,
    Strategy,
    Text,
    Windows,
    WordPooling,
    Words,
)

LAYER_COUNT, HIDDEN_SIZE = 3, 32


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> Checkpoint:
    return checkpoint.find(model_id=str(tiny_folder), revision="", name="", load_format="safetensors", seed=0)


@pytest.fixture(scope="module")
def gpu() -> SimulatedGpu:
    return SimulatedGpu()


@pytest.fixture(scope="module")
def encoder(tiny: Checkpoint, gpu: SimulatedGpu) -> Encoder:
    return Encoder(tiny, device="cpu", dtype="bfloat16", runtime=gpu)


def _text(length: int, *, mask: Sequence[int] | None = None, words: bool = False, types: bool = False) -> Text:
    ids = np.random.default_rng(length).integers(5, 30_000, length).astype(np.int32)
    halves = Words(
        starts=np.array([0, 0]),
        piece_counts=np.array([length // 2, 0]),
        offsets=np.zeros((2, 2), np.int64),
        first_word_count=2,
    )
    return Text(
        ids,
        attention_mask=None if mask is None else np.array(mask, np.int32),
        token_type_ids=np.arange(length, dtype=np.int32) % 2 if types else None,
        words=halves if words else None,
        spans=Spans(starts=np.array([0, length // 3]), counts=np.array([length, 1])) if words else None,
    )


def _sentences(folder: Path, *, vector_size: int = 5) -> SentenceConfig:
    """Returns modules of every kind: on token rows, which keep their size, and on vectors."""
    modules: list[sentence_modules.Module] = []
    for name, of_tokens, size in (("rows", True, HIDDEN_SIZE), ("vectors", False, vector_size)):
        weights = folder / f"{name}.safetensors"
        safetensors.torch.save_file({"linear.weight": torch.randn(size, HIDDEN_SIZE)}, weights)
        modules.append(
            sentence_modules.Dense(
                of_tokens=of_tokens,
                in_size=HIDDEN_SIZE,
                out_size=size,
                has_bias=False,
                activation="Tanh",
                has_residual=of_tokens,
                weights=weights,
                digest="",
            )
        )
    rows, vectors = modules
    return SentenceConfig(
        max_length=64, token_modules=(rows, sentence_modules.Normalize(of_tokens=True)), vector_modules=(vectors,)
    )


def _output(kind: OutputKind, *layers: int, size: int = HIDDEN_SIZE, **more: object) -> Output:
    return Output(kind=kind, layers=layers, row_size=size, **more)  # type: ignore[arg-type]


ALL_LAYERS = _output(OutputKind.HIDDEN_STATES, *range(LAYER_COUNT + 1))
EVERY_OUTPUT = [
    ALL_LAYERS,
    _output(OutputKind.HIDDEN_STATES, 2, mix=Mix(mixing=Mixing.MEAN, layers=(0, 2))),
    _output(OutputKind.POOLER_OUTPUT, LAYER_COUNT),
    _output(OutputKind.ATTENTIONS, 0, LAYER_COUNT - 1, size=2, heads=(1, 3)),
    *(
        _output(
            OutputKind.POOLED_VECTORS,
            LAYER_COUNT,
            size=HIDDEN_SIZE * (1 + (strategy is Strategy.MEAN_MAX)),
            pool=Pool(strategy=strategy, normalize=strategy is Strategy.MEAN),
        )
        for strategy in Strategy
    ),
    *(
        _output(
            OutputKind.SPAN_VECTORS,
            1,
            LAYER_COUNT,
            size=HIDDEN_SIZE * (1 + (strategy is Strategy.MEAN_MAX)),
            pool=Pool(strategy=strategy),
        )
        for strategy in Strategy
        if strategy is not Strategy.CLS  # Which is of a whole text.
    ),
    *(
        _output(
            OutputKind.WORD_VECTORS,
            1,
            LAYER_COUNT,
            size=HIDDEN_SIZE * (1 + (pooling is WordPooling.FIRST_LAST)),
            word_pooling=pooling,
        )
        for pooling in WordPooling
    ),
]


def _run(texts: Sequence[Text], *outputs: Output, dtype: str = "float32") -> Run:
    return Run(plan=Plan(outputs=outputs, dtype=dtype), texts=texts)


def _layers(encoder: Encoder, texts: Sequence[Text]) -> dict[int, np.ndarray]:
    found = encoder.encode([_run(texts, ALL_LAYERS)])
    return {rows.layer: np.frombuffer(rows.data, np.float32).reshape(-1, HIDDEN_SIZE) for rows in found}


def _agrees(encoder: Encoder, texts: Sequence[Text], oracle: Oracle, bound: float) -> None:
    found, start = _layers(encoder, texts), 0
    for text in texts:
        wanted, _ = oracle.run(text.input_ids, text.attention_mask, text.token_type_ids)
        for layer, states in enumerate(wanted):
            own = found[layer][start : start + text.token_count]
            assert np.abs(own - states).max() <= bound, (layer, text.token_count)
        start += text.token_count


OF_MODULES = [
    _output(OutputKind.HIDDEN_STATES, LAYER_COUNT, applies_modules=True),
    _output(
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
        _text(50, words=True),
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
    tiny: Checkpoint, device: str, dtype: str, prefers_fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentences = _sentences(tmp_path)
    with fake_cuda(monkeypatch) if device != "meta" else contextlib.nullcontext():
        _runs_without_waiting(tiny, device, dtype, prefers_fast, sentences)


def _runs_without_waiting(
    tiny: Checkpoint, device: str, dtype: str, prefers_fast: bool, sentences: SentenceConfig
) -> None:
    gpu = SimulatedGpu(device, prefers_fast=prefers_fast)
    encoder = Encoder(tiny, device=device, dtype=dtype, runtime=gpu, sentences=sentences)
    long = _long_text()
    windows = Run(
        plan=_of_windows([*EVERY_OUTPUT, *OF_MODULES]), texts=[long.part(n) for n in range(long.window_count)]
    )
    masked = [_text(9, mask=[1, 0] * 4 + [1]), _text(5, mask=[0] * 5)]
    for texts in ([_text(4, words=True)], [_text(n, words=True, types=n % 2 == 0) for n in (3, 3, 40, 200)] + masked):
        texts = [text if text.words else _text(7, words=True) for text in texts]
        batch = [
            _run(texts, *EVERY_OUTPUT, *OF_MODULES),
            _run(
                masked,
                _output(OutputKind.HIDDEN_STATES, 1),
                _output(OutputKind.ATTENTIONS, 1, size=4, heads=(0, 1, 2, 3)),
            ),
            windows,
            _run(texts[:1], ALL_LAYERS, dtype="float16"),
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
    batch = [_run([_text(9)], ALL_LAYERS), Run(plan=plan, texts=parts)]
    found = {(rows.output_index, rows.layer): rows for rows in encoder.encode(batch) if rows.run_index == 1}
    alone = _layers(encoder, [Text(part.input_ids) for part in parts])
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


def test_modules_of_joined_vectors_run_on_the_device(tiny: Checkpoint, tmp_path: Path) -> None:
    gpu, sentences = SimulatedGpu(), _sentences(tmp_path)
    pooled = np.random.default_rng(0).standard_normal((3, HIDDEN_SIZE), np.float32)
    encoders = [
        Encoder(tiny, device="cpu", dtype="float32", runtime=runtime, sentences=sentences) for runtime in (gpu, None)
    ]
    uploads = gpu.uploads
    found, wanted = (encoder.apply_modules(pooled.copy()) for encoder in encoders)
    assert gpu.uploads == uploads + 1 and found.shape == (3, 5)
    np.testing.assert_allclose(found, wanted, atol=BOUNDS["float32"])


def test_a_varying_attention_that_is_right_and_slow_still_serves_the_graphs(caplog: pytest.LogCaptureFixture) -> None:
    attentions = {
        name: DeviceAttention(gpu, dtype=torch.bfloat16, head_count=4, hidden_size=HIDDEN_SIZE)
        for name, gpu in (("slow", SimulatedGpu(prefers_fast=False)), ("none", SimulatedGpu(varlen=False)))
    }
    assert attentions["slow"].varlen is not None and attentions["none"].varlen is None
    wrong = SimulatedGpu()
    wrong.varlen_attention = lambda query, key, value, bounds, longest: value * 1.1
    with caplog.at_level("INFO"):
        assert DeviceAttention(wrong, dtype=torch.bfloat16, head_count=4, hidden_size=HIDDEN_SIZE).varlen is None
    assert "its numbers differ" in caplog.text


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
    tiny: Checkpoint, tiny_oracle: Oracle, dtype: str, varlen: bool
) -> None:
    encoder = Encoder(tiny, device="cpu", dtype=dtype, runtime=SimulatedGpu(varlen=varlen))
    lengths = [1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 127, 128, 129, 200, 256]
    texts = [_text(length, types=length % 2 == 0) for length in lengths]
    masks = [[1, 0, 1, 1, 0], [0] * 6, [0, 1], [1] * 30 + [0] * 3]
    texts += [_text(len(mask), mask=mask) for mask in masks]
    _agrees(encoder, texts, tiny_oracle, BOUNDS[dtype])


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
    _agrees(encoder, texts[:5], oracle, BOUNDS[dtype])
    _agrees(encoder, texts, oracle, BOUNDS[dtype])
    rows_output = _output(OutputKind.HIDDEN_STATES, LAYER_COUNT, size=3, applies_modules=True)
    pool = Pool(strategy=Strategy.MEAN)
    vector_output = _output(OutputKind.POOLED_VECTORS, LAYER_COUNT, size=3, pool=pool, applies_modules=True)
    uploads = gpu.uploads
    rows, vectors = (
        np.frombuffer(one.data, np.float32).reshape(-1, 3)
        for one in encoder.encode([_run(texts[:5], rows_output, vector_output)])
    )
    assert gpu.uploads == uploads + 1
    last = torch.from_numpy(np.concatenate([oracle.run(text.input_ids)[0][-1] for text in texts[:5]]))
    wanted = F.normalize(torch.tanh(last @ weights["linear.weight"].T + weights["linear.bias"]), dim=1)
    assert np.abs(rows - wanted.numpy()).max() <= 2 * BOUNDS[dtype]
    counts = [text.token_count for text in texts[:5]]
    means = np.stack([part.mean(0) for part in np.split(wanted.numpy(), np.cumsum(counts)[:-1])])
    assert np.abs(vectors - means).max() <= 2 * BOUNDS[dtype]


@pytest.mark.parametrize("lengths", [[1], [64], [13, 2, 30], [60, 5], [200, 100], [3] * 64, [700]], ids=str)
def test_graphs_run_other_batches_than_the_recorded_one(
    gpu: SimulatedGpu, encoder: Encoder, tiny_oracle: Oracle, lengths: list[int]
) -> None:
    if max(lengths) > 512:
        lengths = [length // 2 for length in lengths] * 2
    replays = gpu.replays
    _agrees(encoder, [_text(length) for length in lengths], tiny_oracle, BOUNDS["bfloat16"])
    assert gpu.replays == replays + 1


def test_what_a_graph_can_not_run_runs_layer_by_layer(gpu: SimulatedGpu, encoder: Encoder, tiny_oracle: Oracle) -> None:
    replays = gpu.replays
    for texts in ([_text(6, mask=[1, 1, 0, 0, 1, 1])], [_text(2)] * 65, [_text(400)] * 3):
        _agrees(encoder, texts, tiny_oracle, BOUNDS["bfloat16"])
    (rows,) = encoder.encode([_run([_text(4)], _output(OutputKind.HIDDEN_STATES, 1))])
    assert rows.layer == 1 and gpu.replays == replays


def test_two_batches_at_once_do_not_share_a_graph(gpu: SimulatedGpu, encoder: Encoder) -> None:
    alone = _layers(encoder, [_text(20)])
    replays = gpu.replays
    first = encoder.encode([_run([_text(20)], ALL_LAYERS)])
    started = [next(first)]  # Holds the graph of its size; its copies are still to be made.
    _layers(encoder, [_text(30)])
    assert gpu.replays == replays + 1
    for rows in [*started, *first]:
        np.testing.assert_array_equal(np.frombuffer(rows.data, np.float32), alone[rows.layer].reshape(-1))
    _layers(encoder, [_text(30)])
    assert gpu.replays == replays + 2


def test_host_memory_is_lent_again_only_when_nothing_reads_it(tiny: Checkpoint, tiny_oracle: Oracle) -> None:
    gpu = SimulatedGpu()
    encoder = Encoder(tiny, device="cpu", dtype="float32", runtime=gpu)
    kept: list[Rows] = []
    for length in (30, 30, 31):
        kept += encoder.encode([_run([_text(length)], ALL_LAYERS)])
    for rows, length in zip(kept, [30] * 4 + [30] * 4 + [31] * 4, strict=True):
        wanted, _ = tiny_oracle.run(_text(length).input_ids, None, None)
        found = np.frombuffer(rows.data, np.float32).reshape(-1, HIDDEN_SIZE)
        np.testing.assert_allclose(found, wanted[rows.layer], atol=BOUNDS["float32"])


def test_a_graph_is_free_only_when_its_run_is_over(gpu: SimulatedGpu, encoder: Encoder) -> None:
    nothing = np.zeros(0, np.int64)
    no_words = Words(starts=nothing, piece_counts=nothing, offsets=np.zeros((0, 2), np.int64), first_word_count=0)
    replays = gpu.replays
    output = _output(OutputKind.WORD_VECTORS, LAYER_COUNT, word_pooling=WordPooling.FIRST)
    (rows,) = encoder.encode([_run([dataclasses.replace(_text(2), words=no_words)], output)])
    assert not rows.data.nbytes  # So no copy has been waited for.
    assert gpu.replays_over == gpu.replays == replays + 1


def test_graphs_are_recorded_also_of_a_small_vocabulary(tmp_path: Path) -> None:
    folder = family.save("bert", tmp_path, vocab_size=30)
    found = checkpoint.find(model_id=str(folder), revision="", name="", load_format="safetensors", seed=0)
    gpu = SimulatedGpu()
    encoder = Encoder(found, device="cpu", dtype="bfloat16", runtime=gpu)
    replays = gpu.replays
    _layers(encoder, [Text(np.arange(50, dtype=np.int32) % 30)] * 2)
    assert gpu.replays == replays + 1


class _CannotRecord(SimulatedGpu):
    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")


def test_graphs_end_with_the_first_that_cannot_be_recorded(tiny: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        encoder = Encoder(tiny, device="cpu", dtype="bfloat16", runtime=_CannotRecord())
    assert [line for line in caplog.messages if line.startswith("graph")] == [
        "graph of 64 rows: not available here (RuntimeError: operation not permitted when stream is capturing)"
    ]
    assert len(_layers(encoder, [_text(4)])) == LAYER_COUNT + 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no cuda")
@pytest.mark.parametrize("size", [32, 100, 768])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_of_residual_and_norm(size: int, dtype: torch.dtype) -> None:
    from layertap_server.engine.norm_kernel import add_norm

    generator = torch.Generator().manual_seed(0)
    added, rows = (torch.randn(5, size, generator=generator).cuda() for _ in range(2))
    weight, bias = (torch.randn(size, generator=generator).cuda() for _ in range(2))
    found, cast = add_norm(added.to(dtype), rows, weight, bias, 1e-12)
    wanted = F.layer_norm(added.to(dtype).float() + rows, [size], weight, bias, 1e-12)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert cast.dtype is dtype and torch.equal(cast, found.to(dtype))


def _slower(numbers: torch.Tensor) -> torch.Tensor:
    return numbers + 1


def _wrong(numbers: torch.Tensor) -> torch.Tensor:
    return numbers + 1.1


def _raises(numbers: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no such kernel")


def _not_a_number(numbers: torch.Tensor) -> torch.Tensor:
    return numbers + torch.nan


def _missing() -> Callable[[torch.Tensor], torch.Tensor]:
    raise ImportError("no such module")


@pytest.mark.parametrize(
    ("fast", "prefers_fast", "why"),
    [
        (lambda: _slower, False, "not used (0.50 times as fast"),
        (lambda: _wrong, True, "its numbers differ"),
        (lambda: _not_a_number, True, "its numbers differ"),
        (lambda: _raises, True, "no such kernel"),
        (_missing, True, "no such module"),
    ],
    ids=["slower", "wrong", "NaN", "raises", "missing"],
)
def test_a_fast_path_that_is_no_good_is_not_used(
    fast: Callable[[], Callable[[torch.Tensor], torch.Tensor]],
    prefers_fast: bool,
    why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def plain(numbers: torch.Tensor) -> torch.Tensor:
        return numbers + 1

    with caplog.at_level("INFO"):
        found = tried(
            "adding",
            plain,
            fast,
            lambda way: [way(torch.zeros(3))],
            runtime=SimulatedGpu(prefers_fast=prefers_fast),
            tolerance=0.01,
        )
    assert found.better is plain and not found.is_faster
    assert "adding" in caplog.text and why in caplog.text


def test_a_fast_path_that_is_good_is_used() -> None:
    found = tried(
        "adding",
        lambda numbers: numbers + 1,
        lambda: _slower,
        lambda way: [way(torch.zeros(3))],
        runtime=SimulatedGpu(),
        tolerance=0.01,
    )
    assert found.better is _slower


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


def test_a_graph_is_free_again_after_a_batch_that_failed(gpu: SimulatedGpu, encoder: Encoder) -> None:

    def no_room(first_text: int, output_index: int, layer: int, byte_count: int) -> memoryview:
        raise MemoryError

    batch = [Run(plan=Plan(outputs=(ALL_LAYERS,), dtype="float32"), texts=[_text(4)], allocator=no_room)]
    with pytest.raises(Exception, match="no memory"):
        list(encoder.encode(batch))
    replays = gpu.replays
    done = threading.Event()
    threading.Thread(target=lambda: (_layers(encoder, [_text(4)]), done.set())).start()
    assert done.wait(60) and gpu.replays == replays + 1


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
def test_rows_that_runs_ask_for_alike_come_into_the_buffers_of_each(
    tiny: Checkpoint, encoder: Encoder, on_gpu: bool
) -> None:
    places: dict[tuple[int, int], memoryview] = {}

    def allocate(first_text: int, output_index: int, layer: int, byte_count: int) -> memoryview:
        return places.setdefault((first_text, layer), memoryview(bytearray(byte_count)))

    plan = Plan(outputs=(ALL_LAYERS,), dtype="float32")
    batch = [
        Run(plan=plan, texts=[_text(3 + n)], first_text=n, allocator=allocate if n < 2 else None) for n in (0, 1, 2)
    ]
    found = list((encoder if on_gpu else Encoder(tiny, device="cpu", dtype="float32")).encode(batch))
    assert len(found) == 3 * (LAYER_COUNT + 1)
    for rows in found:
        assert rows.data.nbytes == (3 + rows.run_index) * HIDDEN_SIZE * 4 and any(rows.data)
        assert (rows.data is places.get((rows.run_index, rows.layer))) == (rows.run_index < 2)
