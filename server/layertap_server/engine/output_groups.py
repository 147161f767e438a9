"""The outputs of a batch: an output that several runs ask for alike is computed once, for all of them.

Batches of many callers with a short text each are what a busy server has most of; a pool, a copy and a check of the
numbers for each caller would take longer than the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

from layertap_server.types import Output, OutputKind, Run

_SMALL_BYTES: Final = 64 << 10
"""Up to this size, token rows of a run are copied with those of other runs, and then once more, run by run."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupMember:
    """A run that gets a part of an output."""

    run: Run
    run_index: int
    output_index: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OutputGroup:
    """An output that is computed once for each of its layers, for all runs that ask for it.

    Attributes:
        members: The runs that get it; their rows follow each other in this order.
    """

    output: Output
    dtype: str
    members: list[GroupMember]

    @property
    def run_indices(self) -> list[int]:
        """The runs that get it."""
        return [member.run_index for member in self.members]


def output_groups(batch: Sequence[Run]) -> list[OutputGroup]:
    """Returns all outputs of a batch."""
    found: dict[object, OutputGroup] = {}
    for run_index, run in enumerate(batch):
        for output_index, output in enumerate(run.plan.outputs):
            own = (run_index, output_index) if _is_large(run, output) else None
            dtype = run.plan.dtype_of(output)
            group = found.setdefault((output, dtype, own), OutputGroup(output=output, dtype=dtype, members=[]))
            group.members.append(GroupMember(run=run, run_index=run_index, output_index=output_index))
    return list(found.values())


def wanted_layers(batch: Sequence[Run]) -> list[int]:
    """Returns the layers that outputs need, ascending."""
    outputs = [output for run in batch for output in run.plan.outputs]
    mixed = {layer for output in outputs if output.mix is not None for layer in output.mix.layers}
    return sorted(mixed.union(*(output.layers for output in outputs)))


def _is_large(run: Run, output: Output) -> bool:
    """Whether rows of a run go straight into a buffer of its own."""
    if output.kind not in (OutputKind.HIDDEN_STATES, OutputKind.ATTENTIONS):
        return False
    return sum(output.row_counts(run.texts)) * run.plan.row_bytes(output) > _SMALL_BYTES
