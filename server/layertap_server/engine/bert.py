"""BERT's forward pass over packed rows, from one wanted layer to the next.

The other model types are the same blocks behind other embeddings: what differs is in the table of
`model.architectures`, and weights are known here by their names in BertModel.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from layertap_server.engine.attention import CpuAttention
from layertap_server.engine.block_stack import Attention, BlockStack
from layertap_server.engine.device_attention import DeviceAttention
from layertap_server.engine.embeddings import Embeddings
from layertap_server.engine.graphs import GraphInput, Graphs, Pass
from layertap_server.engine.invariance import NO_PADDING, Invariance, Probe, Rowwise
from layertap_server.engine.linear import dense, filled_up, row_step
from layertap_server.engine.packing import PackedBatch
from layertap_server.engine.runtime import Runtime
from layertap_server.engine.sentence_modules import SentenceModules
from layertap_server.engine.upload import Sent, Upload
from layertap_server.engine.weight_reader import WeightReader
from layertap_server.model.sentence_config import SentenceConfig

log = logging.getLogger(__name__)

Prepared: TypeAlias = "StepInput | GraphInput"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepInput:
    """A batch that runs layer by layer, once its upload is sent.

    Attributes:
        packed_batch: The batch.
        input_ids: Shape: [padded row count].
        token_type_ids: Shape: [padded row count]. None: all 0.
        position_ids: Shape: [padded row count].
        attention: Attends within each text.
    """

    packed_batch: PackedBatch
    input_ids: Sent
    token_type_ids: Sent | None
    position_ids: Sent
    attention: Attention

    def close(self) -> None:
        """Does nothing: its layers are its own."""


_LEAST_TEAM_SIZE: Final = 128
"""Narrower models have nothing to gain from a team, and too few values for a probe to find differences."""


class Bert:
    """The weights of one model on one device, ready to run.

    Attributes:
        sentence_modules: The modules of sentence-transformers in the model's folder.
        invariance: What `probe` found, whose padding is used; none before it, since the probe pads rows itself.
    """

    def __init__(self, reader: WeightReader, *, sentences: SentenceConfig | None, runtime: Runtime | None) -> None:
        """Moves the weights to the device, those of sentence modules too; without a runtime that is the CPU.

        Raises:
            CheckpointError: if a weight is missing or has another shape, or the activation is unknown.
        """
        self._settings = settings = reader.settings
        self._padding_id = settings.padding_position_id
        self._linears = linears = reader.linears
        self._embed = Embeddings(reader)
        self._stack = BlockStack(reader, runtime)
        hidden_size, head_count = settings.hidden_size, settings.num_attention_heads
        self._pooler = None
        if settings.architecture.has_pooler and "pooler.dense.weight" in reader:
            self._pooler = reader.linear("pooler.dense", out_size=hidden_size, in_size=hidden_size)
        self._attention: CpuAttention | DeviceAttention
        self._graphs: Graphs | None = None
        if runtime is None:
            self._attention = CpuAttention(dtype=linears.dtype, head_count=head_count)
        else:
            attention = DeviceAttention(runtime, dtype=linears.dtype, head_count=head_count, hidden_size=hidden_size)
            self._attention = attention
            if attention.varlen is not None:
                longest = settings.max_position_embeddings
                self._graphs = Graphs(self._whole_pass(attention, longest), max_length=longest, runtime=runtime)
        self.sentence_modules = SentenceModules(sentences, linears, self._padded)
        self.invariance = Invariance(padding=NO_PADDING, holds=False, thread_count=1, max_thread_count=1)

    @property
    def has_pooler(self) -> bool:
        """Whether the checkpoint brought pooler weights."""
        return self._pooler is not None

    def prepare(self, packed_batch: PackedBatch, upload: Upload) -> Prepared:
        """Adds what a batch needs to its upload; `close` must follow once its layers are not read any more."""
        row_count = packed_batch.row_count(0)
        pad = np.zeros(self._padded(row_count) - row_count, np.int32)

        def add(array: npt.NDArray[Any]) -> Sent:
            return upload.add(np.concatenate([array, pad], dtype=np.int32) if len(pad) else array.astype(np.int32))

        ids, positions = add(packed_batch.input_ids), add(packed_batch.position_ids(self._padding_id))
        types = packed_batch.token_type_ids
        graph = None if self._graphs is None else self._graphs.take(packed_batch, self._settings.num_hidden_layers)
        if graph is not None:
            sent_types = add(np.zeros(row_count, np.int32) if types is None else types)
            return GraphInput(graph, packed_batch, (ids, sent_types, positions), upload)
        return StepInput(
            packed_batch=packed_batch,
            input_ids=ids,
            token_type_ids=None if types is None else add(types),
            position_ids=positions,
            attention=self._attention.prepare(packed_batch.groups, upload),
        )

    def layers(self, prepared: Prepared, wanted: Sequence[int]) -> Iterator[tuple[int, torch.Tensor] | None]:
        """Yields layers by number, while the next is not yet computed.

        On the CPU also yields None, between blocks of a long batch: it may wait there while another batch runs.

        Args:
            prepared: The batch, once its upload is sent.
            wanted: Which layers, ascending; the deepest of each text is among them.

        Yields:
            The layer and its rows. Shape: [packed_batch.row_count(layer), hidden_size], float32.
        """
        packed_batch = prepared.packed_batch
        if isinstance(prepared, GraphInput):
            layers = prepared.run()
            for layer in wanted:
                yield layer, layers[layer][: packed_batch.row_count(layer)]
            return
        types = prepared.token_type_ids
        rows = self._embed(
            prepared.input_ids.tensor, None if types is None else types.tensor, prepared.position_ids.tensor
        )
        longest = max(group.length for group in packed_batch.groups)
        done, cast = 0, None
        for layer in wanted:
            row_count = packed_batch.row_count(layer)
            rows = rows[: self._padded(row_count)]
            cast = None if cast is None else cast[: len(rows)]
            step = self._stack.count_at_once(len(rows), longest)
            for first in range(done, layer, step):
                if first > done:
                    yield None
                rows, cast = self._stack.run(first, min(first + step, layer), rows, prepared.attention, cast)
            done = layer
            yield layer, rows[:row_count]

    def queries_and_keys(self, rows: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the queries, scaled, and the keys of rows that a block reads; blocks count from 0.

        Shape: [row_count, hidden_size] to [head_count, row_count, head_size] twice, float32.
        """
        row_count = len(rows)
        qkv = self._stack.project(filled_up(rows, self._padded(row_count)), block)[:row_count].float()
        query, key, _ = qkv.view(row_count, 3, self._settings.num_attention_heads, -1).permute(1, 2, 0, 3)
        return query * query.shape[-1] ** -0.5, key

    def pooler(self, first_rows: torch.Tensor) -> torch.Tensor:
        """Applies the pooler to row 0 of texts. Shape: [text_count, hidden_size], float32 in and out."""
        text_count = len(first_rows)
        return self._pool(filled_up(first_rows, self._padded(text_count)))[:text_count]

    def _padded(self, row_count: int) -> int:
        """Returns how many rows to compute for so many."""
        return self._linears.padded(self.invariance.padding.padded(row_count))

    def probe(self, *, thread_count: int, max_thread_count: int) -> Invariance:
        """Returns how rows must be padded for batch invariance on the CPU; starts threads. See `Probe.run`."""
        started = time.perf_counter()
        fused, hidden_size = self._stack.has_gelu, self._settings.hidden_size
        probe = Probe(
            lambda rows, groups: self._stack.run(0, 1, rows, self._attention.prepare(groups, Upload(None)))[0],
            [
                *([Rowwise(self._pool, hidden_size)] if self._pooler else []),
                *([Rowwise(self._embed.project, self._embed.size)] if self._embed.projection else []),
                *self.sentence_modules.rowwise,
            ],
            hidden_size=hidden_size,
            extra=self._linears.padded,
            least_step=1 if fused else row_step(self._settings.intermediate_size),
        )
        if not fused or hidden_size < _LEAST_TEAM_SIZE:
            thread_count = max_thread_count = 1  # Teams give other bits there, and would not be faster.
        found = probe.run(thread_count=thread_count, max_thread_count=max_thread_count)
        log.info(
            "batch invariance: %s; rows at least %d, in steps of %d; %d to %d threads (probed in %.2f s)",
            "holds" if found.holds else "does not hold on this CPU",
            found.padding.least,
            found.padding.step,
            found.thread_count,
            found.max_thread_count,
            time.perf_counter() - started,
        )
        return found

    def _pool(self, first_rows: torch.Tensor) -> torch.Tensor:
        assert self._pooler is not None
        linears = self._linears
        return torch.tanh(dense(first_rows.to(linears.dtype), self._pooler, linears.packed, False)).float()

    def _whole_pass(self, attention: DeviceAttention, longest: int) -> Pass:
        """Returns the pass through all layers that graphs record."""

        def run(
            input_ids: torch.Tensor, token_type_ids: torch.Tensor, position_ids: torch.Tensor, bounds: torch.Tensor
        ) -> list[torch.Tensor]:
            rows, cast = self._embed(input_ids, token_type_ids, position_ids), None
            layers = [rows]
            for block in range(self._settings.num_hidden_layers):
                rows, cast = self._stack.run(
                    block, block + 1, rows, lambda qkv: attention.run_varlen(qkv, bounds, longest), cast
                )
                layers.append(rows)
            return layers

        return run
