"""The encoder: weights on a device, batches in, layers out. The only room with torch in it.

`bert` is the model, over rows that `layout` packs and sorts; `attention` and `linear` are its fast parts; `layer_mix`
makes one layer of several, `pooling` vectors of rows; `host_copy` brings numbers to the host; `faults` names torch's
errors. `Encoder` runs one batch through all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import safetensors.torch
import torch

from layertap_server.engine import device as faults
from layertap_server.engine.bert import Bert, Weights, dummy_weights
from layertap_server.engine.host_copy import DTYPES, Handover
from layertap_server.engine.layer_mix import Mixes
from layertap_server.engine.output_groups import Order, orders, wanted_layers
from layertap_server.engine.packing import Layout
from layertap_server.engine.pooling import pool_rows, pool_words
from layertap_server.model.checkpoint import Checkpoint, CheckpointError
from layertap_server.types import OutputKind, Rows, Run

log = logging.getLogger(__name__)

Allocate = Callable[[int], memoryview]
"""Returns a writable host buffer of so many bytes."""


class Encoder:
    """One model on one device."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str,
        dtype: str,
        allocate: Allocate | None = None,
        packing: bool | None = None,
        thread_count: int = 1,
        max_thread_count: int = 1,
    ) -> None:
        """Loads the weights.

        Args:
            checkpoint: What to load.
            device: "cpu" or "cuda:N".
            dtype: What matrices are multiplied in: "float32", "bfloat16", or on cuda "float16".
            allocate: Where the host buffers of answers come from; None: this module's own.
            packing: Whether weights are laid out for oneDNN on the CPU; None: if it pays.
            thread_count: CPU threads of each instance; see `use_threads`.
            max_thread_count: CPU threads that a lone caller should get.

        Raises:
            CheckpointError: The weights do not fit the configuration.
        """
        self.device = torch.device(device)
        if self.device.type == "cpu":
            self.use_threads(1)  # The loading thread may have no team; see `instances`.
        self._allocate = allocate
        weights = (
            dummy_weights(checkpoint.settings, checkpoint.seed) if not checkpoint.weight_files else _load(checkpoint)
        )
        with torch.inference_mode():
            self._bert = Bert(
                checkpoint.settings,
                weights,
                device=self.device,
                dtype=DTYPES[dtype],
                packing=packing,
                thread_count=thread_count,
                max_thread_count=max_thread_count,
            )

    @property
    def hidden_size(self) -> int:
        """Values a token row has."""
        return self._bert.hidden_size

    @property
    def layer_count(self) -> int:
        """Encoder blocks."""
        return self._bert.layer_count

    @property
    def batch_invariant(self) -> bool:
        """Whether a text has the same bits alone and in any batch."""
        return self._bert.invariance.holds

    @property
    def max_thread_count(self) -> int:
        """How many CPU threads a lone caller may have: the most that give the same bits, of those asked for."""
        return self._bert.invariance.max_thread_count

    @property
    def has_pooler(self) -> bool:
        """Whether the model has pooler weights."""
        return self._bert.has_pooler

    @torch.inference_mode()
    def encode(self, batch: Sequence[Run]) -> Iterator[Rows]:
        """Runs one batch and yields its outputs layer by layer, as each is done.

        Stops at the highest layer that anyone needs; texts leave the batch at the highest layer that their own call
        needs.

        Raises:
            OutOfMemoryError: The device has no memory for the batch.
            DeviceLostError: The device does not work any more.
        """
        with faults.named(self.device):
            yield from self._encode(batch)

    def _encode(self, batch: Sequence[Run]) -> Iterator[Rows]:
        layout = Layout(batch)
        handover = Handover(self.device, self._allocate)
        mixes = Mixes(batch, layout)
        asked = orders(batch)
        try:
            for layer, rows in self._bert.layers(layout, wanted_layers(batch)):
                mixes.add(layer, rows)
                for order in asked:
                    if layer not in order.output.layers:
                        continue
                    values = rows if order.output.mix is None else mixes.whole(order.output.mix)
                    if order.output.kind is OutputKind.HIDDEN_STATES:
                        handover.take(values, order, layer, index=layout.rows(order.run_indices))
                    else:
                        handover.take(self._vectors(values, layout, order), order, layer)
                yield from handover.done()
            yield from handover.rest()
        finally:
            handover.settle()

    def _vectors(self, values: torch.Tensor, layout: Layout, order: Order) -> torch.Tensor:
        """Makes of token rows what an output has a row for. Shape: [word_count or text_count of the runs, row_size]."""
        output, runs = order.output, order.run_indices
        if output.kind is OutputKind.POOLER_OUTPUT:
            first = torch.from_numpy(layout.first_rows(runs)).to(self.device)
            return self._bert.pooler(values.index_select(0, first))
        if output.word_pooling is not None:
            return pool_words(values, layout.words(runs), output.word_pooling)
        assert output.pool is not None
        return pool_rows(values, layout.bags(runs, output.pool), output.pool, output.row_size)

    def memory(self) -> dict[str, int]:
        """Returns the bytes of the device's memory: allocated, reserved, free and total; of a CPU nothing."""
        if self.device.type == "cpu":
            return {}
        try:
            free, total = torch.cuda.mem_get_info(self.device)
        except RuntimeError:  # The device is lost, which its instance tells.
            return {}
        return {
            "allocated": torch.cuda.memory_allocated(self.device),
            "reserved": torch.cuda.memory_reserved(self.device),
            "free": free,
            "total": total,
        }

    @staticmethod
    def use_threads(count: int) -> None:
        """Sets how many threads the calling thread computes with on the CPU."""
        torch.set_num_threads(count)


def pin(memory: memoryview) -> Callable[[], None]:
    """Registers host memory with cuda, so that every device copies straight into it; returns what undoes that.

    Memory that cuda will not take stays what it is: copies into it are right, but slower.
    """
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = np.frombuffer(memory, np.uint8).ctypes.data
    portable = 1
    if int(runtime.cudaHostRegister(address, memory.nbytes, portable)):
        log.warning("cuda does not register shared memory of %d bytes; copies into it will be slower", memory.nbytes)
        return lambda: None

    def unpin() -> None:
        runtime.cudaHostUnregister(address)

    return unpin


def devices(wanted: str) -> list[str]:
    """Returns the devices to use, "cpu" or "cuda:N", each once.

    Args:
        wanted: "auto" (cuda if it is there), "cpu", "cuda" (all of them), or a list such as "cuda:0,cuda:1".

    Raises:
        CheckpointError: A device is not there.
    """
    available = [f"cuda:{n}" for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if wanted == "auto":
        return available[:1] or ["cpu"]
    if wanted == "cpu":
        return ["cpu"]
    chosen = available if wanted == "cuda" else list(dict.fromkeys(wanted.split(",")))
    missing = [name for name in chosen if name not in available]
    if missing or not chosen:
        raise CheckpointError(
            f"--device {wanted} is not to be had: torch sees {', '.join(available) or 'no cuda device'}; "
            "use --device cpu"
        )
    return chosen


def _load(checkpoint: Checkpoint) -> Weights:
    weights: Weights = {}
    try:
        for path in checkpoint.weight_files:
            weights |= safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as exc:
        raise CheckpointError(f"{path.name} cannot be read as safetensors; fetch the model again") from exc
    return weights
