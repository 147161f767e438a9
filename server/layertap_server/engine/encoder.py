"""The model on one device: a batch in, its outputs layer by layer.

`bert` is the model, over rows that `packing` sorts and packs; `layer_mix` makes one layer of several, `pooling` makes
vectors of rows; `output_groups` finds what several runs ask for alike; `upload` brings what they need to the device and
`host_copy` brings numbers to the host; `device` names torch's errors.

On an accelerator the host only queues work: from `Upload.send` to the last layer nothing waits for the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn import functional as F

from layertap_server.engine.attention_output import AttentionOutput
from layertap_server.engine.bert import Bert
from layertap_server.engine.device import memory as device_memory
from layertap_server.engine.device import named_errors
from layertap_server.engine.host_copy import DTYPES, ChosenRows, HostCopy
from layertap_server.engine.invariance import RunProbe, run_here
from layertap_server.engine.layer_mix import Mixes
from layertap_server.engine.linear import Linears
from layertap_server.engine.output_groups import OutputGroup, output_groups, wanted_layers
from layertap_server.engine.packing import PackedBatch
from layertap_server.engine.pooling import TextPooling, WordsPooling
from layertap_server.engine.runtime import Runtime
from layertap_server.engine.sentence_modules import SentenceModules
from layertap_server.engine.upload import Upload
from layertap_server.engine.weight_reader import WeightReader, dummy_weights, load_weights
from layertap_server.model.checkpoint import Checkpoint
from layertap_server.model.sentence_config import SentenceConfig
from layertap_server.types import Encode, Output, OutputKind, Rows, Run, Vectors

log = logging.getLogger(__name__)


class Encoder:
    """One model on one device.

    Attributes:
        device: The device.
        hidden_size: Values a token row has.
        layer_count: Encoder blocks.
        has_pooler: Whether the model has pooler weights.
        batch_invariant: Whether a text has the same bits alone and in any batch.
        thread_count: How many CPU threads each instance may have: those asked for, or one where more change the bits.
        max_thread_count: How many a lone caller may have: the most that give the same bits, of those asked for.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str,
        dtype: str,
        sentences: SentenceConfig | None = None,
        runtime: Runtime | None = None,
        packing: bool | None = None,
        thread_count: int = 1,
        max_thread_count: int = 1,
        run_probe: RunProbe = run_here,
    ) -> None:
        """Loads the weights.

        Args:
            checkpoint: What to load.
            device: "cpu" or "cuda:N".
            dtype: What matrices are multiplied in: "float32", "bfloat16", or on cuda "float16".
            sentences: What the model's folder says about sentences; None: nothing.
            runtime: What stands for the accelerator. None: the device's own; a CPU has none.
            packing: Whether weights are laid out for oneDNN on the CPU; None: if it pays.
            thread_count: CPU threads of each instance; see `use_threads`.
            max_thread_count: CPU threads that a lone caller should get.
            run_probe: Runs the probe for batch invariance, which starts threads.

        Raises:
            CheckpointError: if the weights do not fit the configuration.
            OutOfMemoryError: if the device has no memory for them.
            DeviceLostError: if the device does not work.
        """
        self.device = torch.device(device)
        if runtime is None and self.device.type == "cuda":
            runtime = Runtime(self.device)
        self._runtime = runtime
        if self.device.type == "cpu":
            self.use_threads(1)  # The loading thread may have no team; see `instances`.
        self._selected = contextlib.nullcontext if runtime is None else runtime.selected
        settings = checkpoint.settings
        weights = {} if checkpoint.weight_files else dummy_weights(settings, checkpoint.seed)
        for path in checkpoint.weight_files:
            weights |= load_weights(path, path.name)
        with named_errors(self.device), torch.inference_mode(), self._selected():
            packing = packing if runtime is None else False
            linears = Linears(settings, device=self.device, dtype=DTYPES[dtype], packing=packing)
            self._bert = bert = Bert(WeightReader(weights, settings, linears), sentences=sentences, runtime=runtime)
            if runtime is None:
                bert.invariance = run_probe(
                    lambda: bert.probe(thread_count=thread_count, max_thread_count=max_thread_count)
                )
            else:  # Invariance is not measured there yet.
                runtime.reached().synchronize()  # Other streams do not wait for this thread's.
        self.hidden_size, self.layer_count = settings.hidden_size, settings.num_hidden_layers
        self.has_pooler = bert.has_pooler
        self.batch_invariant = bert.invariance.holds
        self.thread_count = bert.invariance.thread_count
        self.max_thread_count = bert.invariance.max_thread_count

    def encode(self, batch: Sequence[Run]) -> Iterator[Rows]:
        """Runs one batch and yields its outputs layer by layer, as each is done.

        Stops at the highest layer that any run needs; texts leave the batch at the highest layer that their own call
        needs.

        Raises:
            OutOfMemoryError: if the device has no memory for the batch.
            DeviceLostError: if the device no longer works.
        """
        return (rows for rows in self.encode_with_pauses(batch) if rows is not None)

    @torch.inference_mode()
    def encode_with_pauses(self, batch: Sequence[Run]) -> Iterator[Rows | None]:
        """Runs one batch like `encode`; on the CPU yields None too, where another batch may run in the same thread."""
        with named_errors(self.device), self._selected():
            yield from self._encode(batch)

    def _encode(self, batch: Sequence[Run]) -> Iterator[Rows | None]:
        packed_batch = PackedBatch(batch)
        upload = Upload(self._runtime)
        host_copy = HostCopy(self._runtime)
        mixes = Mixes(batch, packed_batch)
        prepared = self._bert.prepare(packed_batch, upload)
        try:
            made = [_MadeOutput(group, packed_batch, self._bert, upload) for group in output_groups(batch)]
            upload.send()
            for step in self._bert.layers(prepared, wanted_layers(batch)):
                if step is None:
                    yield None
                    continue
                layer, rows = step
                mixes.add(layer, rows)
                for one in [one for one in made if layer in one.group.output.layers]:
                    mix = one.group.output.mix
                    made_of = rows if mix is None else mixes.whole(mix)
                    host_copy.take(one.of(made_of, layer), one.group, layer, chosen=one.chosen)
                    if self._runtime is None:  # Attentions of one layer take longer than its block.
                        yield from host_copy.done()
                        yield None
                yield from host_copy.done()
            yield from host_copy.rest()
        finally:
            host_copy.wait()
            upload.wait()
            prepared.close()

    @torch.inference_mode()
    def apply_modules(self, pooled: Vectors) -> Vectors:
        """Applies the modules of vectors to pooled ones. Shape: [count, pooled size] to [count, vector_size], float32.

        Raises:
            OutOfMemoryError: if the device has no memory for it.
            DeviceLostError: if the device no longer works.
        """
        with named_errors(self.device), self._selected():
            upload = Upload(self._runtime)
            sent = upload.add(pooled)
            upload.send()
            found = host = self._bert.sentence_modules.of_vectors(sent.tensor)
            if self._runtime is not None:
                host = torch.frombuffer(self._runtime.host_memory(found.nbytes), dtype=found.dtype).view(found.shape)
                self._runtime.to_host([(host, found)]).synchronize()
            upload.wait()
            vectors: Vectors = host.numpy()
            return vectors

    def encode_beside(self) -> Encode:
        """Returns `encode` for one more thread, whose batches an accelerator runs beside those of others."""
        if self._runtime is None:
            return self.encode
        queue = self._runtime.queue()

        def encode(batch: Sequence[Run]) -> Iterator[Rows]:
            with queue:
                yield from self.encode(batch)

        return encode

    def memory(self) -> dict[str, int]:
        """Returns the bytes of the device's memory; see `device.memory`."""
        return device_memory(self.device)

    @staticmethod
    def use_threads(count: int) -> None:
        """Sets how many threads the calling thread computes with on the CPU."""
        torch.set_num_threads(count)


class _MadeOutput:
    """How one output is made of a layer.

    Attributes:
        group: The output, and the runs that get it.
        chosen: The rows to bring of what is made. None: all.
    """

    def __init__(self, group: OutputGroup, packed_batch: PackedBatch, bert: Bert, upload: Upload) -> None:
        """Adds what it needs to the batch's upload."""
        self.group = group
        self.chosen: ChosenRows | None = None
        self._make: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._attentions: AttentionOutput | None = None
        output, runs = group.output, group.run_indices
        if output.kind is OutputKind.HIDDEN_STATES:
            self.chosen = ChosenRows(packed_batch.rows(runs), upload)
            self._make = bert.sentence_modules.of_tokens if output.applies_modules else None
        elif output.kind is OutputKind.ATTENTIONS:
            self._attentions = AttentionOutput(bert, packed_batch, runs, output.heads, upload)
        elif output.kind is OutputKind.POOLER_OUTPUT:
            first_rows = upload.add(packed_batch.first_rows(runs))
            self._make = lambda values: bert.pooler(values.index_select(0, first_rows.tensor))
        elif output.word_pooling is not None:
            self._make = WordsPooling(packed_batch.words(runs), output.word_pooling, upload)
        elif output.applies_modules:
            self._make = _sentence_vectors(output, packed_batch, runs, bert.sentence_modules, upload)
        else:
            assert output.pool is not None
            bags_of = packed_batch.spans if output.kind is OutputKind.SPAN_VECTORS else packed_batch.bags
            self._make = TextPooling(bags_of(runs, output.pool), output.pool, output.row_size, upload)

    def of(self, values: torch.Tensor, layer: int) -> torch.Tensor:
        """Makes of a layer's rows what the output has a row for. Shape: [row_count of the output, row_size]."""
        if self._attentions is not None:
            return self._attentions(values, layer)
        return values if self._make is None else self._make(values)


def _sentence_vectors(
    output: Output, packed_batch: PackedBatch, runs: Sequence[int], modules: SentenceModules, upload: Upload
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns what makes the vectors of sentence-transformers of a layer. Shape: [text_count, row_size]."""
    pools = [dataclasses.replace(pool, normalize=False) for pool in output.pools]
    poolings = [TextPooling(packed_batch.bags(runs, pool), pool, None, upload) for pool in pools]
    normalize = output.pool is not None and output.pool.normalize

    def make(values: torch.Tensor) -> torch.Tensor:
        rows = modules.of_tokens(values)
        pooled = torch.cat([pooling(rows) for pooling in poolings], dim=1)
        if output.is_part:
            return pooled
        vectors = modules.of_vectors(pooled)[:, : output.row_size]
        return F.normalize(vectors, dim=1, eps=1e-12) if normalize else vectors

    return make
