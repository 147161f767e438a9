"""A short text beside a long one of another caller, on the real model: who is answered first, and with which bits."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from layertap_server.engine import cpu_threads
from layertap_server.engine.encoder import Encoder
from layertap_server.model import checkpoint
from layertap_server.scheduler.batcher import Batcher
from layertap_server.scheduler.call import Call
from layertap_server.scheduler.events import Event, RowsReady, RunDone
from layertap_server.scheduler.queue_limits import QueueLimits
from layertap_server.types import Encode, Output, OutputKind, Plan, Pool, Rows, Run, Strategy, Text

WAIT_S = 60.0
LONG, SHORT = 500, 5
MEAN = Pool(strategy=Strategy.MEAN)
VECTORS = Plan(outputs=(Output(kind=OutputKind.POOLED_VECTORS, layers=(6,), row_size=384, pool=MEAN),), dtype="float32")
ATTENTIONS = Plan(
    outputs=(Output(kind=OutputKind.ATTENTIONS, layers=tuple(range(6)), row_size=12, heads=tuple(range(12))),),
    dtype="float16",
)


class Held:
    """An instance whose long batches stop at their first pause until they may go on."""

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        self.pauses = threading.Event()
        self.may_go_on = threading.Event()

    def __call__(self, batch: Sequence[Run]) -> Iterator[Rows | None]:
        for rows in self._encode(batch):
            if rows is None and sum(text.token_count for run in batch for text in run.texts) >= LONG:
                self.pauses.set()
                assert self.may_go_on.wait(WAIT_S)
            yield rows


@pytest.fixture(scope="module")
def encode(real_folder: Path) -> Encode:
    found = checkpoint.find(model_id=str(real_folder), revision="", name="", load_format="safetensors", seed=0)
    encoder = Encoder(found, device="cpu", dtype="float32")
    (made,) = cpu_threads.make([encoder], cpu_threads.share(instance_count=1, thread_count=1))
    return made


def _text(length: int) -> Text:
    return Text(np.random.default_rng(length).integers(1000, 20_000, length).astype(np.int32))


@pytest.mark.parametrize("plan", [VECTORS, ATTENTIONS], ids=["vectors", "attentions"])
def test_a_short_text_is_answered_before_a_long_one_that_came_first(encode: Encode, plan: Plan) -> None:
    alone = {
        length: [bytes(rows.data) for rows in encode([Run(plan=own, texts=[_text(length)])]) if rows is not None]
        for length, own in ((LONG, plan), (SHORT, VECTORS))
    }
    held = Held(encode)
    batcher = Batcher(
        [held],
        QueueLimits(
            max_batch_tokens=1024,
            max_batch_bytes=1 << 30,
            min_share_tokens=64,
            max_queue_texts=100,
            max_queue_tokens=10_000,
            max_output_bytes=1 << 30,
            max_call_output_bytes=1 << 30,
        ),
    )
    events: queue.Queue[tuple[int, Event]] = queue.Queue()
    answers: dict[int, list[bytes]] = {LONG: [], SHORT: []}

    def call(length: int, own: Plan) -> Call:
        made = batcher.open(own, client=str(length), deliver=lambda event: events.put((length, event)))
        made.add([_text(length)])
        return made

    calls = [call(LONG, plan)]
    assert held.pauses.wait(WAIT_S)
    calls.append(call(SHORT, VECTORS))
    held.may_go_on.set()
    ended: list[int] = []
    while len(ended) < 2:
        length, event = events.get(timeout=WAIT_S)
        assert isinstance(event, RowsReady | RunDone)
        if isinstance(event, RunDone):
            ended.append(length)
        else:
            answers[length].append(bytes(event.rows.data))
    for one in calls:
        one.close()
    assert batcher.stop(WAIT_S)
    assert ended == [SHORT, LONG]
    assert answers == alone


def test_a_batch_of_short_texts_seldom_pauses(encode: Encode) -> None:
    """No call is short beside them, and each pause waits for the interpreter."""

    def pauses(texts: Sequence[Text]) -> int:
        return sum(rows is None for rows in encode([Run(plan=VECTORS, texts=list(texts))]))

    short = [_text(SHORT)] * 200
    assert 2 * pauses(short) <= pauses([_text(LONG), _text(LONG)])
