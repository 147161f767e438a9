"""Texts that run as windows, through the queue: an engine whose rows are token ids, and whose pools their means."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from layertap import InternalError, InvalidArgumentError, OutOfRangeError
from layertap_server.engine.oom_retry import with_oom_retry
from layertap_server.scheduler.batcher import Batcher
from layertap_server.scheduler.call import Call
from layertap_server.scheduler.events import Event, RowsReady, RunDone
from layertap_server.scheduler.queue_limits import QueueLimits
from layertap_server.scheduler.window_rows import narrowed
from layertap_server.types import OutOfMemoryError, Output, OutputKind, Plan, Pool, Rows, Run, Strategy, Text, Windows

WAIT_S = 20.0
LAYER = Output(kind=OutputKind.HIDDEN_STATES, layers=(0, 1), row_size=1)
MEAN = Output(kind=OutputKind.POOLED_VECTORS, layers=(1,), row_size=1, pooled_size=1, pool=Pool(strategy=Strategy.MEAN))
PLAN = Plan(outputs=(LAYER, MEAN), dtype="float32").with_windows()
"""8 bytes a token and 4 a text, and 4 for each window."""


def text(first: int, length: int, *, stride: int = 3, max_length: int = 12) -> Text:
    ids = np.arange(first, first + length, dtype=np.int32)
    if length <= max_length:
        return Text(ids)
    windows = Windows(token_count=length, max_length=max_length, stride=stride, prefix_count=1, suffix_count=1)
    return Text(ids, windows=windows)


class Engine:
    """An `encode` that notes the tokens of each batch. A window cannot be sent whose second token is in `failing`."""

    def __init__(self) -> None:
        self.batches: queue.Queue[list[int]] = queue.Queue()
        self.failing: set[int] = set()

    def __call__(self, runs: Sequence[Run]) -> Iterator[Rows]:
        self.batches.put([one.token_count for run in runs for one in run.texts])
        for layer in (0, 1):
            for run_index, run in enumerate(runs):
                for output_index, output in enumerate(run.plan.outputs):
                    if layer in output.layers:
                        yield self._rows(run_index, run, output_index, layer)

    def _rows(self, run_index: int, run: Run, output_index: int, layer: int) -> Rows:
        output = run.plan.outputs[output_index]
        rows: list[Any] = []
        for one in run.texts:
            if output.pool is not None:
                rows.append([one.input_ids[output.pool.positions(one)].mean()])
            else:
                kept = one.input_ids if one.window is None else one.input_ids[list(one.window.kept)]
                rows.append(kept + 1000 * layer)
        refused = {
            n: InvalidArgumentError("no")
            for n, one in enumerate(run.texts)
            if one.input_ids[:2].tolist()[-1] in self.failing
        }
        data = memoryview(np.concatenate(rows).astype("<f4").tobytes())
        return Rows(run_index=run_index, output_index=output_index, layer=layer, data=data, failures=refused)


@pytest.fixture
def engine() -> Engine:
    return Engine()


LIMITS = {
    "max_batch_tokens": 30,
    "max_batch_bytes": 10_000,
    "min_share_tokens": 1,
    "max_queue_texts": 1000,
    "max_queue_tokens": 10_000,
    "max_output_bytes": 100_000,
    "max_call_output_bytes": 50_000,
}


def batcher_of(*engines: Engine, **limits: int) -> Batcher:
    return Batcher(engines, QueueLimits(**LIMITS | limits))


@pytest.fixture
def batcher(engine: Engine) -> Iterator[Batcher]:
    made = batcher_of(engine)
    yield made
    made.stop(WAIT_S)


def collected(events: queue.Queue[Event], count: int, call: Call | None) -> tuple[list[RowsReady], list[RunDone]]:
    """Waits until so many texts are done, and gives back what a call holds of each."""
    ready: list[RowsReady] = []
    done: list[RunDone] = []
    while sum(len(one.texts) for one in done) < count:
        event = events.get(timeout=WAIT_S)
        assert isinstance(event, RowsReady | RunDone), event
        if isinstance(event, RowsReady):
            ready.append(event)
            continue
        done.append(event)
        if call is not None:
            call.release(event.reserved_bytes, run_done=True)
    return ready, done


def rows_of(ready: list[RowsReady], position: int, output_index: int, layer: int) -> list[float]:
    """Returns the rows of one text, whichever events they came in."""
    found: list[tuple[int, list[float]]] = []
    for event in ready:
        if (event.rows.output_index, event.rows.layer) == (output_index, layer):
            values, start = np.frombuffer(event.rows.data, "<f4"), 0
            if event.first_row or len(values) != sum(PLAN.outputs[output_index].row_counts(event.texts)):
                found += [(event.first_row, values.tolist())] if event.first_text == position else []
                continue
            counts = PLAN.outputs[output_index].row_counts(event.texts)
            for n, count in enumerate(counts):
                if event.first_text + n == position:
                    found.append((event.first_row, values[start : start + count].tolist()))
                start += count
    return [value for _, values in sorted(found) for value in values]


@settings(max_examples=30, phases=[Phase.explicit, Phase.generate])  # To shrink would take minutes.
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=8),
    keeps_rows=st.booleans(),
    instances=st.integers(1, 3),
    budget=st.integers(1, 60),
)
def test_texts_come_back_whole_whatever_batches_their_windows_were_in(
    lengths: list[int], keeps_rows: bool, instances: int, budget: int
) -> None:
    engines = [Engine() for _ in range(instances)]
    batcher = batcher_of(*engines, max_batch_tokens=budget)
    events: queue.Queue[Event] = queue.Queue()
    texts = [text(100 * n, length) for n, length in enumerate(lengths)]
    call = batcher.open(PLAN, client="a", deliver=events.put, keeps_rows=keeps_rows)
    call.add(texts)
    ready, done = collected(events, len(texts), call)
    for n, one in enumerate(texts):
        wanted = one.input_ids.astype(float)
        for layer in (0, 1):
            assert rows_of(ready, n, 0, layer) == (wanted + 1000 * layer).tolist()
        assert rows_of(ready, n, 1, 1) == [np.float32(wanted.mean())]
    for engine in engines:
        while not engine.batches.empty():
            tokens = engine.batches.get()
            assert len(tokens) == 1 or sum(tokens) <= budget
    assert sum(one.reserved_bytes for one in done) == sum(map(PLAN.byte_counts.of, texts))
    assert batcher.held_bytes == 0 and call.held_run_count == 0 and batcher.waiting_token_count == 0
    call.close()
    assert batcher.stop(WAIT_S)


def test_windows_wait_as_the_tokens_that_they_compute(engine: Engine) -> None:
    long = text(0, 50)
    assert long.windows is not None and long.computed_token_count > 60
    batcher = batcher_of(engine, max_output_bytes=1, max_call_output_bytes=1)  # Nothing is ever taken.
    call = batcher.open(PLAN, client="a", deliver=lambda _: None)
    call.add([long])
    assert batcher.waiting_token_count == long.computed_token_count and batcher.waiting_text_count == 1
    call.close()
    assert batcher.waiting_token_count == batcher.waiting_text_count == 0
    batcher.stop(WAIT_S)


def test_all_of_a_text_is_reserved_with_its_first_window(engine: Engine) -> None:
    """Else calls could each hold the rows of some windows and wait for each other for ever."""
    long = text(0, 50)
    size = PLAN.held_bytes(long)
    batcher = batcher_of(engine, max_output_bytes=size, max_call_output_bytes=size, max_batch_tokens=12)
    events: list[queue.Queue[Event]] = [queue.Queue() for _ in range(3)]
    calls = [batcher.open(PLAN, client=str(n), deliver=events[n].put) for n in range(3)]
    for call in calls:
        call.add([long])
    for n, call in enumerate(calls):  # Each gets on as soon as the one before has been read.
        _, (done,) = collected(events[n], 1, None)
        assert batcher.held_bytes == PLAN.byte_counts.of(long)
        call.release(done.reserved_bytes, run_done=True)
    batcher.stop(WAIT_S)


def test_what_a_window_cannot_send_fails_its_text_alone(engine: Engine, batcher: Batcher) -> None:
    engine.failing.add(115)  # The third window of the second text.
    events: queue.Queue[Event] = queue.Queue()
    call = batcher.open(PLAN, client="a", deliver=events.put)
    call.add([text(0, 40), text(100, 40), text(200, 5), text(300, 40)])
    ready, _ = collected(events, 4, call)
    failed = {event.first_text + n for event in ready for n in event.rows.failures}
    assert failed == {1}
    assert batcher.held_bytes == 0


def test_a_call_that_has_left_computes_no_more_windows(engine: Engine) -> None:
    batcher = batcher_of(engine, max_batch_tokens=12)
    events: queue.Queue[Event] = queue.Queue()

    def leave(event: Event) -> None:  # In the thread of the instance, so that it cannot run ahead.
        call.close()
        events.put(event)

    call = batcher.open(PLAN, client="a", deliver=leave, keeps_rows=False)
    call.add([text(0, 5000)])
    assert isinstance(events.get(timeout=WAIT_S), RowsReady)
    assert batcher.waiting_token_count == 0 and batcher.held_bytes == 0
    assert batcher.stop(WAIT_S)
    assert engine.batches.qsize() == 1


def test_windows_of_a_batch_keep_to_the_bytes_of_their_parts(engine: Engine) -> None:
    plan = Plan(outputs=(MEAN,), dtype="float16").with_windows()  # 2 bytes a text, of parts of 4 bytes each.
    batcher = batcher_of(engine, max_batch_tokens=1000, max_batch_bytes=8)
    events: queue.Queue[Event] = queue.Queue()
    call = batcher.open(plan, client="a", deliver=events.put)
    call.add([text(0, 60)])
    collected(events, 1, call)
    assert batcher.stop(WAIT_S)
    assert max(len(engine.batches.get()) for _ in range(engine.batches.qsize())) == 2


def test_windows_that_find_no_memory_together_run_alone(engine: Engine) -> None:
    most = 12

    def small(runs: Sequence[Run]) -> Iterator[Rows]:
        if sum(one.token_count for run in runs for one in run.texts) > most:
            raise OutOfMemoryError
        yield from engine(runs)

    batcher = Batcher((with_oom_retry(small),), QueueLimits(**LIMITS))
    events: queue.Queue[Event] = queue.Queue()
    call = batcher.open(PLAN, client="a", deliver=events.put)
    texts = [text(0, 40), text(100, 5), text(200, 60), text(300, 12)]
    call.add(texts)
    ready, _ = collected(events, 4, call)
    assert not any(event.rows.failures for event in ready)
    for n, one in enumerate(texts):
        assert rows_of(ready, n, 0, 0) == one.input_ids.tolist()
        assert rows_of(ready, n, 1, 1) == [np.float32(one.input_ids.mean())]
    most = 8
    call.add([text(0, 40)])
    ready, _ = collected(events, 1, call)
    assert all("no memory" in event.rows.failures[0].details for event in ready)
    assert batcher.held_bytes == 0
    batcher.stop(WAIT_S)


@pytest.mark.parametrize(("dtype", "value"), [("float16", 65520.0), ("bfloat16", 3.3953138e38)])
def test_made_rows_that_do_not_fit_are_refused(dtype: str, value: float) -> None:
    _, error = narrowed(np.array([[value]], np.float32), dtype, 3)
    assert isinstance(error, OutOfRangeError)
    _, error = narrowed(np.array([[np.nextafter(np.float32(value), np.float32(0))]], np.float32), dtype, 3)
    assert error is None


def test_made_rows_are_rounded_to_the_nearest_bfloat16_and_ties_to_even() -> None:
    bits = np.array([[0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0xBF818000]], np.uint32)
    data, _ = narrowed(bits.view(np.float32), "bfloat16", 3)
    assert np.frombuffer(data, "<u2").tolist() == [0x3F80, 0x3F82, 0x3F80, 0x3F81, 0xBF82]


def test_made_rows_of_no_number_are_the_models_fault() -> None:
    for value in (np.nan, np.inf):
        _, error = narrowed(np.array([[0, value]], np.float32), "float32", 3)
        assert isinstance(error, InternalError) and "NaN or infinity" in error.details
