"""Batches that do not fit: an engine with little memory that breaks off at any layer gives what a large one gives."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from layertap import ResourceExhaustedError
from layertap_server.engine.oom_retry import with_oom_retry
from layertap_server.types import OutOfMemoryError, Output, OutputKind, Plan, Pool, Rows, Run, Strategy, Text, Unit

LAYERS = Output(kind=OutputKind.HIDDEN_STATES, layers=(0, 2), row_size=1)
VECTOR = Output(kind=OutputKind.POOLED_VECTORS, layers=(1,), row_size=1, pool=Pool(strategy=Strategy.CLS))
PLANS = [Plan(outputs=outputs, dtype="float32") for outputs in ((LAYERS,), (VECTOR,), (VECTOR, LAYERS))]


class SmallEngine:
    """Runs out of memory above so many tokens, at a layer that chance chooses; counts what it was given."""

    def __init__(self, memory_tokens: int, chance: random.Random) -> None:
        self.batch_sizes: list[int] = []
        self._memory_tokens, self._chance = memory_tokens, chance

    def __call__(self, batch: Sequence[Run]) -> Iterator[Rows]:
        token_count = sum(text.token_count for run in batch for text in run.texts)
        self.batch_sizes.append(sum(len(run.texts) for run in batch))
        fails_at = self._chance.randrange(2) if token_count > self._memory_tokens else None
        for layer in range(3):
            for run_index, run in enumerate(batch):
                for output_index, output in enumerate(run.plan.outputs):
                    if layer in output.layers:
                        if layer == fails_at and self._chance.random() < 0.5:
                            raise OutOfMemoryError
                        yield rows_of(run, run_index, output_index, layer)
            if layer == fails_at:
                raise OutOfMemoryError


def rows_of(run: Run, run_index: int, output_index: int, layer: int) -> Rows:
    values = [value for text in run.texts for value in wanted(run.plan.outputs[output_index], text, layer)]
    data = memoryview(np.array(values, "<f4")).cast("B")
    return Rows(run_index=run_index, output_index=output_index, layer=layer, data=data, failures={})


def wanted(output: Output, text: Text, layer: int) -> list[float]:
    return [float(n + 1000 * layer) for n in (text.input_ids if output.unit is Unit.TOKEN else text.input_ids[:1])]


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=5),
    memory_tokens=st.integers(0, 30),
    seed=st.integers(0, 1000),
)
def test_every_tensor_comes_once_and_whole_and_only_what_fits_nowhere_is_refused(
    sizes: list[list[int]], memory_tokens: int, seed: int
) -> None:
    chance = random.Random(seed)
    engine = SmallEngine(memory_tokens, chance)
    batch = [
        Run(
            plan=chance.choice(PLANS),
            texts=[Text(np.arange(start := chance.randrange(500), start + size, dtype=np.int32)) for size in run],
            first_text=chance.randrange(100),
        )
        for run in sizes
    ]
    all_rows = list(with_oom_retry(engine)(batch))
    found = {(rows.run_index, rows.output_index, rows.layer): rows for rows in all_rows}
    assert len(all_rows) == len(found) == sum(len(output.layers) for run in batch for output in run.plan.outputs)
    for (run_index, output_index, layer), rows in found.items():
        run, values = batch[run_index], np.frombuffer(rows.data, "<f4").tolist()
        for position, text in enumerate(run.texts):
            right = wanted(run.plan.outputs[output_index], text, layer)
            own, values = values[: len(right)], values[len(right) :]
            if position in rows.failures:
                assert text.token_count > memory_tokens
                assert isinstance(rows.failures[position], ResourceExhaustedError)
            else:
                assert own == right
        assert not values
    for run_index, run in enumerate(batch):
        failed = {position for place, rows in found.items() if place[0] == run_index for position in rows.failures}
        fitting = {position for position, text in enumerate(run.texts) if text.token_count <= memory_tokens}
        assert not failed & fitting


def test_a_text_too_large_costs_its_neighbours_nothing_but_time() -> None:
    engine = SmallEngine(10, random.Random(0))
    texts = [Text(np.arange(size, dtype=np.int32)) for size in (3, 3, 11, 3)]
    *_, rows = with_oom_retry(engine)([Run(plan=PLANS[0], texts=texts)])
    assert rows.layer == 2 and list(rows.failures) == [2]
    assert "11 tokens" in rows.failures[2].details
    assert engine.batch_sizes == [4, 2, 2, 1, 1], "only what does not fit is halved"
