"""The model on one device: a batch in, its outputs layer by layer.

`bert` is the model, over rows that `packing` sorts and packs; `attention` and `linear` are its fast parts;
`layer_mix` makes one layer of several, `pooling` makes vectors of rows; `output_groups` finds what several runs ask
for alike; `host_copy` brings numbers to the host; `device` names torch's errors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import safetensors.torch
import torch

from layertap_server.engine.bert import Bert, Weights, dummy_weights
from layertap_server.engine.device import memory as device_memory
from layertap_server.engine.device import named_errors
from layertap_server.engine.host_copy import DTYPES, HostCopy
from layertap_server.engine.layer_mix import Mixes
from layertap_server.engine.output_groups import OutputGroup, output_groups, wanted_layers
from layertap_server.engine.packing import PackedBatch
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
        with named_errors(self.device):
            yield from self._encode(batch)

    def _encode(self, batch: Sequence[Run]) -> Iterator[Rows]:
        packed_batch = PackedBatch(batch)
        host_copy = HostCopy(self.device, self._allocate)
        mixes = Mixes(batch, packed_batch)
        groups = output_groups(batch)
        try:
            for layer, rows in self._bert.layers(packed_batch, wanted_layers(batch)):
                mixes.add(layer, rows)
                for group in groups:
                    if layer not in group.output.layers:
                        continue
                    values = rows if group.output.mix is None else mixes.whole(group.output.mix)
                    if group.output.kind is OutputKind.HIDDEN_STATES:
                        host_copy.take(values, group, layer, index=packed_batch.rows(group.run_indices))
                    else:
                        host_copy.take(self._vectors(values, packed_batch, group), group, layer)
                yield from host_copy.done()
            yield from host_copy.rest()
        finally:
            host_copy.wait()

    def _vectors(self, values: torch.Tensor, packed_batch: PackedBatch, group: OutputGroup) -> torch.Tensor:
        """Makes of token rows what an output has a row for. Shape: [word_count or text_count of the runs, row_size]."""
        output, runs = group.output, group.run_indices
        if output.kind is OutputKind.POOLER_OUTPUT:
            first = torch.from_numpy(packed_batch.first_rows(runs)).to(self.device)
            return self._bert.pooler(values.index_select(0, first))
        if output.word_pooling is not None:
            return pool_words(values, packed_batch.words(runs), output.word_pooling)
        assert output.pool is not None
        return pool_rows(values, packed_batch.bags(runs, output.pool), output.pool, output.row_size)

    def memory(self) -> dict[str, int]:
        """Returns the bytes of the device's memory; see `device.memory`."""
        return device_memory(self.device)

    @staticmethod
    def use_threads(count: int) -> None:
        """Sets how many threads the calling thread computes with on the CPU."""
        torch.set_num_threads(count)


def _load(checkpoint: Checkpoint) -> Weights:
    weights: Weights = {}
    try:
        for path in checkpoint.weight_files:
            weights |= safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as exc:
        raise CheckpointError(f"{path.name} cannot be read as safetensors; fetch the model again") from exc
    return weights
