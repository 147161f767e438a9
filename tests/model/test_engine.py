"""Requests of many kinds in one batch: whatever shares it, each text comes out as transformers computes it alone."""

from __future__ import annotations

import dataclasses
import itertools
import queue
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.faulty import Demand, FaultyEncoder
from support.oracle import POOLINGS, Oracle
from support.simulated_gpu import SimulatedGpu

from layertap_server.engine import cpu_threads
from layertap_server.engine.encoder import Encoder
from layertap_server.engine.linear import Linears
from layertap_server.model import checkpoint
from layertap_server.parity.compare import BOUNDS
from layertap_server.scheduler.batcher import Batcher
from layertap_server.scheduler.call import Call
from layertap_server.scheduler.events import Event, RowsReady, RunDone
from layertap_server.scheduler.queue_limits import QueueLimits
from layertap_server.types import (
    Mix,
    Mixing,
    Output,
    OutputKind,
    Plan,
    Pool,
    Run,
    Strategy,
    Text,
    WordPooling,
    Words,
)

LAYER_COUNT, HIDDEN_SIZE, HEAD_COUNT = 3, 32, 4
WAIT_S = 60.0


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=[1, 2, 0], ids=["1 instance", "2 instances", "simulated GPU"])
def batcher(request: pytest.FixtureRequest, tiny_folder: Path, device: str, dtype: str) -> Iterator[Batcher]:
    if device != "cpu" and request.param != 2:
        pytest.skip("a device has two instances, and needs no stand-in")
    found = checkpoint.find(model_id=str(tiny_folder), revision="", name="", load_format="safetensors", seed=0)
    threads = cpu_threads.share(instance_count=request.param)
    encoder = Encoder(
        found,
        device=device if device == "cpu" else "cuda:0",
        dtype=dtype,
        runtime=None if request.param else SimulatedGpu(),
        max_thread_count=threads.lone_thread_count,
    )
    encodes = cpu_threads.make([encoder], threads) if request.param else [encoder.encode_beside() for _ in range(2)]
    made = Batcher(
        encodes,
        QueueLimits(
            max_batch_tokens=150,
            max_batch_bytes=1 << 20,
            min_share_tokens=10,
            max_queue_texts=10_000,
            max_queue_tokens=1_000_000,
            max_output_bytes=1 << 26,
            max_call_output_bytes=1 << 26,
        ),
    )
    yield made
    assert made.stop(timeout_s=60)


def test_torch_compiles_the_blocks(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = checkpoint.find(model_id=str(tiny_folder), revision="", name="", load_format="safetensors", seed=0)
    with caplog.at_level("INFO"):
        Encoder(found, device="cpu", dtype="float32")
    assert "prepacked" in caplog.text and "step by step" not in caplog.text


def test_few_numbers_of_rows_reach_onednn(real_folder: Path) -> None:
    shape = checkpoint.find(model_id=str(real_folder), revision="", name="", load_format="safetensors", seed=0).settings
    linears = Linears(shape, device=torch.device("cpu"), dtype=torch.float32)
    numbers = range(1, 1025)
    more = [linears.padded(number) - number for number in numbers]
    assert min(more) == 0 and more[:16] == [0] * 16
    if linears.packed:
        assert max(more) < 8 and len({linears.padded(number) for number in numbers}) <= 1024 // 4
    else:
        assert not any(more)


def test_instances_run_in_halves_what_finds_no_memory(tiny_folder: Path) -> None:
    found = checkpoint.find(model_id=str(tiny_folder), revision="", name="", load_format="safetensors", seed=0)
    faulty = FaultyEncoder(found, device="cpu", dtype="float32", batch_s=0.0)
    (encode,) = cpu_threads.make([faulty], cpu_threads.share(instance_count=1, thread_count=1))
    output = Output(kind=OutputKind.HIDDEN_STATES, layers=(0, LAYER_COUNT), row_size=HIDDEN_SIZE)
    texts = [Text(np.array([Demand.NO_MEMORY_TOGETHER, 40 + n], np.int32)) for n in range(3)]
    runs = [Run(plan=Plan(outputs=(output,), dtype="float32"), texts=[text]) for text in texts]
    rows = [one for one in encode(runs) if one is not None]
    assert sorted((one.run_index, one.layer) for one in rows) == list(itertools.product(range(3), output.layers))
    assert not any(one.failures for one in rows)


@pytest.mark.parametrize("lengths", [(9, 8, 20), (30, 31, 37)], ids=str)
def test_rows_that_only_fill_up_a_batch_change_nothing(real_folder: Path, lengths: tuple[int, ...]) -> None:
    found = checkpoint.find(model_id=str(real_folder), revision="", name="", load_format="safetensors", seed=0)
    encoder = Encoder(found, device="cpu", dtype="float32")
    texts = [Text(np.arange(2000, 2000 + length, dtype=np.int32)) for length in lengths]
    # Each of another depth, so that the batch loses texts on its way, and has another number of rows each time.
    runs = [
        Run(
            plan=Plan(outputs=(Output(kind=OutputKind.HIDDEN_STATES, layers=(depth,), row_size=384),), dtype="float32"),
            texts=[text],
        )
        for depth, text in zip((6, 4, 2), texts, strict=False)
    ]
    together = {rows.run_index: np.frombuffer(rows.data, np.float32) for rows in encoder.encode(runs)}
    for index, run in enumerate(runs):
        (alone,) = encoder.encode([run])
        np.testing.assert_allclose(together[index], np.frombuffer(alone.data, np.float32), atol=2e-5)


layers = st.integers(0, LAYER_COUNT)
hidden_states = st.sets(layers, min_size=1).map(
    lambda chosen: Output(kind=OutputKind.HIDDEN_STATES, layers=tuple(sorted(chosen)), row_size=HIDDEN_SIZE)
)
pooler_output = st.just(Output(kind=OutputKind.POOLER_OUTPUT, layers=(LAYER_COUNT,), row_size=HIDDEN_SIZE))
pooled_vectors = st.builds(
    lambda layer, strategy, normalize: Output(
        kind=OutputKind.POOLED_VECTORS,
        layers=(layer,),
        row_size=HIDDEN_SIZE * (2 if strategy is Strategy.MEAN_MAX else 1),
        pool=Pool(strategy=strategy, normalize=normalize),
    ),
    layers,
    st.sampled_from(Strategy),
    st.booleans(),
)
word_vectors = st.builds(
    lambda layers, pooling: Output(
        kind=OutputKind.WORD_VECTORS,
        layers=tuple(sorted(layers)),
        row_size=HIDDEN_SIZE * (2 if pooling is WordPooling.FIRST_LAST else 1),
        word_pooling=pooling,
    ),
    st.sets(layers, min_size=1),
    st.sampled_from(WordPooling),
)


attentions = st.builds(
    lambda layers, heads: Output(
        kind=OutputKind.ATTENTIONS, layers=tuple(sorted(layers)), row_size=len(heads), heads=tuple(sorted(heads))
    ),
    st.sets(st.integers(0, LAYER_COUNT - 1), min_size=1),
    st.sets(st.integers(0, HEAD_COUNT - 1), min_size=1),
)


def _mixed(output: Output, mixing: Mixing, chosen: list[int], weights: list[float]) -> Output:
    """Returns an output of a mix instead of its own layers."""
    own = tuple(weights[: len(chosen)]) if mixing is Mixing.WEIGHTED else ()
    mix = Mix(mixing=mixing, layers=tuple(chosen), weights=own)
    row_size = output.row_size * (len(chosen) if mixing is Mixing.CONCAT else 1)
    return dataclasses.replace(output, layers=(mix.top,), row_size=row_size, mix=mix)


mixed = st.builds(
    _mixed,
    hidden_states | pooled_vectors | word_vectors,
    st.sampled_from(Mixing),
    st.lists(layers, min_size=1, unique=True),
    st.lists(st.floats(0.25, 2, width=16), min_size=LAYER_COUNT + 1, max_size=LAYER_COUNT + 1),
)
outputs = hidden_states | pooler_output | pooled_vectors | word_vectors | attentions | mixed
plans = st.lists(outputs, min_size=1, max_size=3).map(lambda outputs: Plan(outputs=tuple(outputs), dtype="float32"))


@st.composite
def texts(draw: st.DrawFn) -> Text:
    length = draw(st.integers(1, 40))
    seed = draw(st.integers(0, 50))
    random = np.random.default_rng(seed)
    mask = random.integers(0, 2, length).astype(np.int32) if draw(st.booleans()) else None
    if mask is not None and not mask.any():
        mask[0] = 1
    types = random.integers(0, 2, length).astype(np.int32) if draw(st.booleans()) else None
    return Text(
        random.integers(5, 30_000, length).astype(np.int32),
        attention_mask=None if mask is None or mask.all() else mask,
        token_type_ids=None if types is None or not types.any() else types,
        words=_words(random, length),
    )


def _words(random: np.random.Generator, token_count: int) -> Words:
    """Returns words of no, one or several tokens, with gaps between them; sometimes none at all."""
    starts, counts, position = [], [], 0
    for _ in range(int(random.integers(0, 12))):
        position += int(random.integers(0, 2))
        count = min(int(random.integers(0, 4)), token_count - position)
        if count < 0:
            break
        starts.append(position if count else 0)
        counts.append(count)
        position += count
    offsets = np.zeros((len(starts), 2), np.int64)
    return Words(
        starts=np.array(starts, np.int64),
        piece_counts=np.array(counts, np.int64),
        offsets=offsets,
        first_word_count=len(starts),
    )


requests = st.tuples(plans, st.lists(texts(), min_size=1, max_size=8), st.booleans())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=st.lists(requests, min_size=1, max_size=5))
def test_any_mix_of_requests_gives_each_what_it_asked_for(
    batcher: Batcher, tiny_oracle: Oracle, dtype: str, wanted: list[tuple[Plan, list[Text], bool]]
) -> None:
    calls: list[tuple[Call, queue.SimpleQueue[Event]]] = []
    for n, (plan, own, _) in enumerate(wanted):
        inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        call = batcher.open(plan, client=f"client {n % 2}", deliver=inbox.put)
        calls.append((call, inbox))
        call.add(own)
    for (call, _), (_, _, leaves) in zip(calls, wanted, strict=True):
        if leaves:
            call.close()
    for (call, inbox), (plan, own, leaves) in zip(calls, wanted, strict=True):
        if not leaves:
            _check(call, inbox, plan, own, tiny_oracle, BOUNDS[dtype])
            call.close()
    assert batcher.held_bytes == 0 and batcher.waiting_text_count == 0


def _check(
    call: Call, inbox: queue.SimpleQueue[Event], plan: Plan, own: list[Text], oracle: Oracle, bound: float
) -> None:
    left, came = len(own), set[tuple[int, int, int]]()
    while left:
        event = inbox.get(timeout=WAIT_S)
        if isinstance(event, RunDone):
            left -= len(event.texts)
            call.release(event.reserved_bytes, run_done=True)
            continue
        assert isinstance(event, RowsReady) and not event.rows.failures
        output = plan.outputs[event.rows.output_index]
        rows = np.frombuffer(event.rows.data, np.float32).reshape(-1, output.row_size)
        for n, text in enumerate(event.texts):
            came.add((event.first_text + n, event.rows.output_index, event.rows.layer))
            (count,) = output.row_counts([text])
            found, rows = rows[:count], rows[count:]
            wanted = _wanted(oracle, output, event.rows.layer, text)
            room = 1 if output.mix is None else 2 * (LAYER_COUNT + 1)
            assert found.shape == wanted.shape and np.abs(found - wanted).max(initial=0.0) <= bound * room
    places = {(n, k, layer) for n in range(len(own)) for k, one in enumerate(plan.outputs) for layer in one.layers}
    assert came == places


def _wanted(oracle: Oracle, output: Output, layer: int, text: Text) -> np.ndarray:
    if output.kind is OutputKind.ATTENTIONS:
        probabilities = oracle.attentions(text.input_ids, text.attention_mask, text.token_type_ids)[layer]
        return probabilities[list(output.heads)].transpose(1, 2, 0).reshape(-1, len(output.heads))
    states, pooler = oracle.run(text.input_ids, text.attention_mask, text.token_type_ids)
    if output.kind is OutputKind.POOLER_OUTPUT:
        return pooler[None]
    rows = states[layer] if output.mix is None else _mix(output.mix, states)
    if output.word_pooling is not None:
        return _word_rows(output, rows, text.words)
    if output.pool is None:
        return rows
    if output.pool.strategy is not Strategy.CLS and text.attention_mask is not None:
        rows = rows[text.attention_mask == 1]
    vector = POOLINGS[output.pool.strategy.name.lower()](rows)
    return (vector / np.linalg.norm(vector) if output.pool.normalize else vector)[None]


def _mix(mix: Mix, states: list[np.ndarray]) -> np.ndarray:
    chosen = [states[layer] for layer in mix.layers]
    if mix.mixing is Mixing.CONCAT:
        return np.concatenate(chosen, axis=1)
    if mix.mixing is Mixing.WEIGHTED:
        return sum(weight * layer for weight, layer in zip(mix.weights, chosen, strict=True))
    return np.sum(chosen, axis=0) if mix.mixing is Mixing.SUM else np.mean(chosen, axis=0)


def _word_rows(output: Output, rows: np.ndarray, words: Words) -> np.ndarray:
    made = np.zeros((len(words.starts), output.row_size), np.float32)
    for n, (start, count) in enumerate(zip(words.starts, words.piece_counts, strict=True)):
        if own := list(rows[start : start + count]):
            both = np.concatenate([own[0], own[-1]])
            ways = {"FIRST": own[0], "LAST": own[-1], "MEAN": np.mean(own, axis=0), "FIRST_LAST": both}
            made[n] = ways[output.word_pooling.name]
    return made
