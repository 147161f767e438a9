"""One run of every instance at start, so that the first caller does not pay for what the libraries set up."""

from __future__ import annotations

import queue
from typing import Final

import numpy as np

from layertap.errors import DeadlineExceededError
from layertap_server.scheduler.batcher import Batcher
from layertap_server.scheduler.events import CallFailed, Event, RunDone
from layertap_server.types import Output, OutputKind, Plan, Text

_TIMEOUT_S: Final = 300.0


def warm_up(batcher: Batcher, *, token_count: int, layer_count: int, hidden_size: int) -> None:
    """Runs a text in every instance, to the first and the last layer, and waits for the results.

    Raises:
        LayertapError: if a batch fails, or an instance gives no rows for 300 s.
    """
    texts = [Text(np.zeros(token_count, np.int32)) for _ in range(batcher.instance_count)]
    output = Output(kind=OutputKind.HIDDEN_STATES, layers=(0, layer_count), row_size=hidden_size)
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    call = batcher.open(Plan(outputs=(output,), dtype="float32"), client="warm-up", deliver=events.put)
    try:
        call.add(texts)
        left = len(texts)
        while left:
            event = events.get(timeout=_TIMEOUT_S)
            if isinstance(event, CallFailed):
                raise event.error
            left -= len(event.texts) if isinstance(event, RunDone) else 0
    except queue.Empty as exc:
        raise DeadlineExceededError(f"the engine gave no rows within {_TIMEOUT_S:.0f} s") from exc
    finally:
        call.close()
