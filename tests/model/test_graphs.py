"""Recorded graphs of the engine: used where they fit, by one batch at a time, and left where they cannot be made."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import family
from support.device_runs import (
    ALL_LAYERS,
    LAYER_COUNT,
    check_agrees,
    layers_of,
    output_of,
    run_of,
    text_of,
)
from support.oracle import Oracle
from support.simulated_gpu import SimulatedGpu

from layertap_server.engine.encoder import Encoder
from layertap_server.model import checkpoint
from layertap_server.model.checkpoint import Checkpoint
from layertap_server.parity.compare import BOUNDS
from layertap_server.types import (
    OutputKind,
    Plan,
    Run,
    Text,
    WordPooling,
    Words,
)


@pytest.mark.parametrize("lengths", [[1], [64], [13, 2, 30], [60, 5], [200, 100], [3] * 64, [700]], ids=str)
def test_graphs_run_other_batches_than_the_recorded_one(
    gpu: SimulatedGpu, encoder: Encoder, tiny_oracle: Oracle, lengths: list[int]
) -> None:
    if max(lengths) > 512:
        lengths = [length // 2 for length in lengths] * 2
    replays = gpu.replays
    check_agrees(encoder, [text_of(length) for length in lengths], tiny_oracle, BOUNDS["bfloat16"])
    assert gpu.replays == replays + 1


def test_what_a_graph_can_not_run_runs_layer_by_layer(gpu: SimulatedGpu, encoder: Encoder, tiny_oracle: Oracle) -> None:
    replays = gpu.replays
    for texts in ([text_of(6, mask=[1, 1, 0, 0, 1, 1])], [text_of(2)] * 65, [text_of(400)] * 3):
        check_agrees(encoder, texts, tiny_oracle, BOUNDS["bfloat16"])
    (rows,) = encoder.encode([run_of([text_of(4)], output_of(OutputKind.HIDDEN_STATES, 1))])
    assert rows.layer == 1 and gpu.replays == replays


def test_two_batches_at_once_do_not_share_a_graph(gpu: SimulatedGpu, encoder: Encoder) -> None:
    alone = layers_of(encoder, [text_of(20)])
    replays = gpu.replays
    first = encoder.encode([run_of([text_of(20)], ALL_LAYERS)])
    started = [next(first)]  # Holds the graph of its size; its copies are still to be made.
    layers_of(encoder, [text_of(30)])
    assert gpu.replays == replays + 1
    for rows in [*started, *first]:
        np.testing.assert_array_equal(np.frombuffer(rows.data, np.float32), alone[rows.layer].reshape(-1))
    layers_of(encoder, [text_of(30)])
    assert gpu.replays == replays + 2


def test_a_graph_is_free_only_when_its_run_is_over(gpu: SimulatedGpu, encoder: Encoder) -> None:
    nothing = np.zeros(0, np.int64)
    no_words = Words(starts=nothing, piece_counts=nothing, offsets=np.zeros((0, 2), np.int64), first_word_count=0)
    replays = gpu.replays
    output = output_of(OutputKind.WORD_VECTORS, LAYER_COUNT, word_pooling=WordPooling.FIRST)
    (rows,) = encoder.encode([run_of([dataclasses.replace(text_of(2), words=no_words)], output)])
    assert not rows.data.nbytes  # So no copy has been waited for.
    assert gpu.replays_over == gpu.replays == replays + 1


def test_graphs_are_recorded_also_of_a_small_vocabulary(tmp_path: Path) -> None:
    folder = family.save("bert", tmp_path, vocab_size=30)
    found = checkpoint.find(model_id=str(folder), revision="", name="", load_format="safetensors", seed=0)
    gpu = SimulatedGpu()
    encoder = Encoder(found, device="cpu", dtype="bfloat16", runtime=gpu)
    replays = gpu.replays
    layers_of(encoder, [Text(np.arange(50, dtype=np.int32) % 30)] * 2)
    assert gpu.replays == replays + 1


class _CannotRecord(SimulatedGpu):
    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")


def test_graphs_end_with_the_first_that_cannot_be_recorded(
    tiny_model: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        encoder = Encoder(tiny_model, device="cpu", dtype="bfloat16", runtime=_CannotRecord())
    assert [line for line in caplog.messages if line.startswith("graph")] == [
        "graph of 64 rows: not available here (RuntimeError: operation not permitted when stream is capturing)"
    ]
    assert len(layers_of(encoder, [text_of(4)])) == LAYER_COUNT + 1


def test_a_graph_is_free_again_after_a_batch_that_failed(gpu: SimulatedGpu, encoder: Encoder) -> None:

    def no_room(first_text: int, output_index: int, layer: int, byte_count: int) -> memoryview:
        raise MemoryError

    batch = [Run(plan=Plan(outputs=(ALL_LAYERS,), dtype="float32"), texts=[text_of(4)], allocator=no_room)]
    with pytest.raises(Exception, match="no memory"):
        list(encoder.encode(batch))
    replays = gpu.replays
    done = threading.Event()
    threading.Thread(target=lambda: (layers_of(encoder, [text_of(4)]), done.set())).start()
    assert done.wait(60) and gpu.replays == replays + 1
