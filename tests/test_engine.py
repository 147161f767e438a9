"""Requests of many kinds in one batch: whoever shares it, each text comes out as transformers computes it alone."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import BOUND, Oracle
from test_fidelity import POOLINGS

from layertap_server import checkpoint, lanes
from layertap_server.batcher import Batcher
from layertap_server.call import Call, Event, RowsReady, RunDone
from layertap_server.encoder import Encoder
from layertap_server.work import Output, OutputKind, Plan, Pool, Strategy, Text

LAYER_COUNT, HIDDEN_SIZE = 3, 32
WAIT_S = 60.0
BOUNDS = {"float32": BOUND, "bfloat16": 0.1}
"""How far a number may be from the oracle's, by the dtype that matrices are multiplied in."""


@pytest.fixture(scope="module", params=list(BOUNDS))
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=[1, 2], ids=["1 lane", "2 lanes"])
def batcher(request: pytest.FixtureRequest, tiny_folder: Path, device: str, dtype: str) -> Iterator[Batcher]:
    found = checkpoint.find(model_id=str(tiny_folder), revision="", name="", load_format="safetensors", seed=0)
    devices = [device if device == "cpu" else "cuda:0"]
    encoders = [Encoder(found, device=one, dtype=dtype) for one in devices]
    made = Batcher(
        lanes.make(encoders, lane_count=request.param, thread_count=0),
        max_batch_tokens=150,
        max_batch_bytes=1 << 20,
        min_share_tokens=10,
        max_queue_texts=10_000,
        max_queue_tokens=1_000_000,
        max_output_bytes=1 << 26,
        max_call_output_bytes=1 << 26,
    )
    yield made
    assert made.stop(timeout_s=60)


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
plans = st.lists(hidden_states | pooler_output | pooled_vectors, min_size=1, max_size=3).map(
    lambda outputs: Plan(outputs=tuple(outputs), dtype="float32")
)


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
            count = text.token_count if output.per_token else 1
            found, rows = rows[:count], rows[count:]
            assert np.abs(found - _wanted(oracle, output, event.rows.layer, text)).max() <= bound
    places = {(n, k, layer) for n in range(len(own)) for k, one in enumerate(plan.outputs) for layer in one.layers}
    assert came == places


def _wanted(oracle: Oracle, output: Output, layer: int, text: Text) -> np.ndarray:
    states, pooler = oracle.run(text.input_ids, text.attention_mask, text.token_type_ids)
    if output.pool is None:
        return states[layer] if output.per_token else pooler[None]
    rows = states[layer]
    if output.pool.strategy is not Strategy.CLS and text.attention_mask is not None:
        rows = rows[text.attention_mask == 1]
    vector = POOLINGS[output.pool.strategy.name.lower()](rows)
    return (vector / np.linalg.norm(vector) if output.pool.normalize else vector)[None]
