"""The engine of `support.queued`, and what makes batchers with it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.queued import WAIT_S, Engine, Make

from layertap_server.scheduler.batcher import Batcher
from layertap_server.scheduler.queue_limits import QueueLimits


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def make(engine: Engine) -> Iterator[Make]:
    """Makes batchers with generous limits, and stops them."""
    made: list[Batcher] = []

    def one(*engines: Engine, **limits: int) -> Batcher:
        generous = {
            "max_batch_tokens": 100,
            "max_batch_bytes": 10_000,
            "min_share_tokens": 1,
            "max_queue_texts": 1000,
            "max_queue_tokens": 10_000,
            "max_output_bytes": 100_000,
            "max_call_output_bytes": 50_000,
        }
        made.append(Batcher(engines or (engine,), QueueLimits(**generous | limits)))
        return made[-1]

    yield one
    engine.let_go(1000)
    for batcher in made:
        batcher.stop(WAIT_S)
