"""A server whose encoder costs nothing, or a fixed time a batch: layertap's own service, queue and memory, around it.

The numbers are ready: row r of layer k of a batch is row k + r of `tensors.block`. As by the real encoder, each layer
is copied once, into the buffer that the call would like it in. Takes the flags of layertap-server.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tensors
import torch
from compute import BASE_SETTINGS

from layertap_server import cli
from layertap_server.app.server import App
from layertap_server.engine.encoder import Encoder
from layertap_server.model.checkpoint import Checkpoint
from layertap_server.types import Rows, Run


class StandIn(Encoder):
    """Answers every batch with prepared rows."""

    def __init__(
        self, checkpoint: Checkpoint, *, device: str, dtype: str, batch_s: float = 0.0, **_others: object
    ) -> None:
        self._batch_s = batch_s
        self.device = torch.device("cpu")
        self._values = tensors.block(4096).reshape(-1)

    has_pooler = batch_invariant = True
    thread_count = max_thread_count = 1

    def encode_with_pauses(self, batch: Sequence[Run]) -> Iterator[Rows | None]:
        if self._batch_s:
            time.sleep(self._batch_s)
        for layer in range(max(run.plan.depth for run in batch) + 1):
            for run_index, run in enumerate(batch):
                for output_index, output in enumerate(run.plan.outputs):
                    if layer in output.layers:
                        data = self._rows(run, output_index, layer)
                        yield Rows(run_index=run_index, output_index=output_index, layer=layer, data=data, failures={})

    def _rows(self, run: Run, output_index: int, layer: int) -> memoryview:
        output = run.plan.outputs[output_index]
        row_count = sum(output.row_counts(run.texts))
        byte_count = row_count * run.plan.row_bytes(output)
        data = run.allocate(output_index, layer, byte_count)
        if data is None:
            data = np.empty(byte_count, np.uint8).data.cast("B")
        dtype = np.float32 if run.plan.dtype == "float32" else np.float16
        target = np.frombuffer(data, dtype)
        start = layer * tensors.WIDTH
        target[:] = self._values[start : start + len(target)]
        return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh-pages", action="store_true", help="serve without layertap.keep_pages")
    parser.add_argument("--batch-s", type=float, default=0.0, help="how long each batch takes at least")
    arguments, flags = parser.parse_known_args()
    # Kept: a server ends at once, without a chance to remove it.
    folder = Path(tempfile.gettempdir()) / f"layertap-stand-in-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    (folder / f"config.{os.getpid()}").write_text(json.dumps(BASE_SETTINGS))
    (folder / f"config.{os.getpid()}").replace(folder / "config.json")
    own = ["--port", "0", "--model-id", str(folder), "--model-name", "stand-in", "--load-format", "dummy"]
    config = cli.parse([*own, *flags], os.environ)
    logging.basicConfig(level=config.log_level.upper())
    make_encoder = functools.partial(StandIn, batch_s=arguments.batch_s)
    make_app = functools.partial(App, make_encoder=make_encoder)
    if arguments.fresh_pages:
        asyncio.run(make_app(config).serve(ready=lambda address: print(address, flush=True)))
    else:
        cli.run(config, make_app)


if __name__ == "__main__":
    main()
