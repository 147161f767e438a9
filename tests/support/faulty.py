"""A layertap-server whose engine fails on demand. For tests alone: nothing in the product leads here.

What it is to do is said by token ids that no text has; it logs every batch. `--batch-s` makes each batch last so long.
Takes the flags of layertap-server.
"""

from __future__ import annotations

import argparse
import enum
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from layertap_server import cli
from layertap_server.app.server import App
from layertap_server.engine.encoder import Encoder
from layertap_server.observability import log_format
from layertap_server.types import DeviceLostError, OutOfMemoryError, Rows, Run

log = logging.getLogger("faulty")


class Demand(enum.IntEnum):
    """Ids of `[unused…]` tokens. Each acts after the first layer."""

    NO_MEMORY_TOGETHER = 11
    """Out of memory, unless the text is alone."""
    NO_MEMORY = 12
    BROKEN = 13
    DEVICE_LOST = 14
    STUCK = 15


class FaultyEncoder(Encoder):
    """The real encoder, with faults."""

    def __init__(self, *args: Any, batch_s: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._batch_s = batch_s

    def encode_with_pauses(self, batch: Sequence[Run]) -> Iterator[Rows | None]:
        texts = [text for run in batch for text in run.texts]
        log.info("encoding %d texts", len(texts))
        demands = {int(number) for text in texts for number in text.input_ids} & set(Demand)
        time.sleep(self._batch_s)
        first_layer: int | None = None
        for rows in super().encode_with_pauses(batch):
            if rows is not None:
                first_layer = rows.layer if first_layer is None else first_layer
                if rows.layer > first_layer:
                    for demand in demands:
                        _act(Demand(demand), len(texts))
            yield rows


def _act(demand: Demand, text_count: int) -> None:
    if demand is Demand.NO_MEMORY or (demand is Demand.NO_MEMORY_TOGETHER and text_count > 1):
        raise OutOfMemoryError
    if demand is Demand.BROKEN:
        raise RuntimeError("the engine broke")
    if demand is Demand.DEVICE_LOST:
        raise DeviceLostError
    if demand is Demand.STUCK:
        threading.Event().wait()


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--batch-s", type=float, default=0.0)
    arguments, flags = parser.parse_known_args()
    log_format.set_up(level="info", form="text")
    make_encoder = functools.partial(FaultyEncoder, batch_s=arguments.batch_s)
    return cli.run(cli.parse(flags, os.environ), functools.partial(App, make_encoder=make_encoder))


if __name__ == "__main__":
    sys.exit(main())
