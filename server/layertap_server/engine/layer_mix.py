"""Several layers as one, in float32 on the device, while the layers come by.

A mix is a layer that the model does not have: once whole, it has the rows of its highest layer, in their order, and
whatever can be made of a layer can be made of it. Until then only its accumulator is held. Requests that ask for the
same mix share it. How much all of them may take in a batch, the queue sees to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layertap_server.engine.packing import PackedBatch
from layertap_server.types import Mix, Mixing, Run


class Mixes:
    """The mixes of one batch."""

    def __init__(self, batch: Sequence[Run], packed_batch: PackedBatch) -> None:
        """Finds out which are asked for."""
        self._packed_batch = packed_batch
        mixes = (output.mix for run in batch for output in run.plan.outputs)
        self._wanted = list(dict.fromkeys(mix for mix in mixes if mix is not None))
        self._held: dict[Mix, torch.Tensor] = {}

    def add(self, layer: int, rows: torch.Tensor) -> None:
        """Adds the next layer, and frees the mixes that were complete before it. Shape: [row_count, hidden_size]."""
        for mix in self._wanted:
            if mix.top < layer:
                self._held.pop(mix, None)
            elif layer in mix.layers:
                self._add(mix, layer, rows[: self._packed_batch.row_count(mix.top)])

    def whole(self, mix: Mix) -> torch.Tensor:
        """Returns a mix whose highest layer was the last to be added. Shape: [row_count, mixed_size], float32."""
        return self._held[mix]

    def _add(self, mix: Mix, layer: int, rows: torch.Tensor) -> None:
        place, size = mix.layers.index(layer), rows.shape[1]
        held = self._held.get(mix)
        if mix.mixing is Mixing.CONCAT:
            if held is None:
                held = rows.new_empty(len(rows), len(mix.layers) * size)
            held[:, place * size : (place + 1) * size] = rows
        else:
            weight = mix.weights[place] if mix.weights else 1.0
            # Not in one step: whether that rounds once or twice may depend on where in the tensor a value lies.
            held = rows * weight if held is None else held.add_(rows if weight == 1.0 else rows * weight)
            if mix.mixing is Mixing.MEAN and layer == mix.top:
                held.div_(len(mix.layers))
        self._held[mix] = held
