"""A model on its way into a server: its files, its tokenizer, its devices, and the encoders that have its weights.

With several processes all of this happens once, in the process that the others are forked from. So nothing here may
leave a thread behind or touch a GPU there: what must do so runs in a child, and encoders of a GPU are made after the
fork.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Final

from layertap_server.app.child_process import in_child
from layertap_server.app.limits import cpu_batch_bytes
from layertap_server.config import Config
from layertap_server.engine import cpu_threads, device
from layertap_server.engine.cpu_threads import CpuThreads
from layertap_server.engine.encoder import Encoder
from layertap_server.model import checkpoint
from layertap_server.model.checkpoint import Checkpoint, CheckpointError
from layertap_server.model.facts import ModelFacts
from layertap_server.model.files import reason_of
from layertap_server.model.sentence_config import SentenceConfig
from layertap_server.model.tokenizer import Tokenizer
from layertap_server.scheduler.queue_limits import QueueLimits
from layertap_server.types import DeviceLostError, OutOfMemoryError

log = logging.getLogger(__name__)

_CPU_BATCH_TOKENS: Final = 1024
_CUDA_BATCH_TOKENS: Final = 32_768
_CUDA_BATCH_BYTES: Final = 256 << 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FoundModel:
    """A model that can be served, before its weights are read.

    Attributes:
        lock: A file that forked processes lock while they make encoders. None: there are no others.
    """

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    sentences: SentenceConfig
    devices: list[str]
    dtype: str
    fingerprint: str
    threads: CpuThreads
    lock: int | None

    @property
    def on_cpu(self) -> bool:
        """Whether the CPU computes."""
        return self.devices == ["cpu"]

    def queue_limits(self, share: Config) -> QueueLimits:
        """Returns the limits of the queue of a process that has this share of the settings."""
        batch_tokens, batch_bytes = _CUDA_BATCH_TOKENS, _CUDA_BATCH_BYTES
        if self.on_cpu:
            batch_tokens = _CPU_BATCH_TOKENS
            batch_bytes = cpu_batch_bytes(self.threads.instance_count, share.max_call_output_bytes)
        return QueueLimits(
            max_batch_tokens=share.max_batch_tokens or batch_tokens,
            max_batch_bytes=share.max_batch_bytes or batch_bytes,
            min_share_tokens=share.min_share_tokens,
            max_queue_texts=share.max_queue_text_count,
            max_queue_tokens=share.max_queue_token_count,
            max_output_bytes=share.max_output_bytes,
            max_call_output_bytes=share.max_call_output_bytes,
        )

    def encoders(self, make_encoder: Callable[..., Encoder], *, before_fork: bool) -> list[Encoder]:
        """Reads the weights; returns an encoder for each device. Before a fork it leaves no thread behind.

        After it one process after the other does so: on a GPU an encoder times which way is faster there.

        Raises:
            CheckpointError: if the weights do not fit the configuration, or a device has no room for them or breaks.
        """
        probing = {"run_probe": in_child} if before_fork else {}
        alone = contextlib.nullcontext() if before_fork or self.lock is None else _locked(self.lock)
        with self._start_errors(), alone, timed(f"loaded the weights on {', '.join(self.devices)}"):
            return [
                make_encoder(
                    self.checkpoint,
                    device=device,
                    dtype=self.dtype,
                    sentences=self.sentences,
                    thread_count=self.threads.thread_count,
                    max_thread_count=self.threads.lone_thread_count,
                    **probing,
                )
                for device in self.devices
            ]

    @contextlib.contextmanager
    def _start_errors(self) -> Iterator[None]:
        """Raises errors of a device as what stops a server at its start."""
        try:
            yield
        except OutOfMemoryError as exc:
            raise CheckpointError(f"{exc} for the weights; make room there, or choose another with --device") from exc
        except DeviceLostError as exc:
            raise CheckpointError(
                f"{exc}; start the server again, if need be with --dtype float32, which tries no fast ways"
            ) from exc
        except RuntimeError as exc:
            if self.on_cpu:
                raise
            where = ", ".join(self.devices)
            log.exception("the model does not run on %s", where)
            raise CheckpointError(
                f"the model does not run on {where} ({reason_of(exc)}); install a torch for this GPU and its driver, "
                "or choose --device cpu"
            ) from exc

    def facts(self, *, has_pooler: bool) -> ModelFacts:
        """Returns what requests need to know of it."""
        return self.tokenizer.model_facts(self.checkpoint, fingerprint=self.fingerprint, has_pooler=has_pooler)


def find_model(config: Config) -> FoundModel:
    """Finds the model that the settings name.

    Raises:
        CheckpointError: if it cannot be served, or a device is not there.
    """
    with timed("found the model"):
        found = checkpoint.find(
            model_id=config.model_id,
            revision=config.revision,
            name=config.model_name,
            load_format=config.load_format,
            seed=config.seed,
        )
    with timed("loaded the tokenizer"):
        tokenizer = Tokenizer(found.tokenizer_folder)
    tokenizer.check_fits(found)

    def choose() -> tuple[list[str], str]:
        devices = device.devices(config.device)
        return devices, device.compute_dtype(config.dtype, devices)

    # A process that has asked for its GPUs cannot be forked any more.
    devices, dtype = in_child(choose) if config.processes > 1 else choose()
    sentences = tokenizer.sentence_config(found)
    if sentences.unsupported:
        log.warning("no sentence vectors with this model: %s", sentences.unsupported)
    with timed("took the fingerprint"):
        fingerprint = found.fingerprint(tokenizer=tokenizer.description, sentences=sentences.description, dtype=dtype)
    return FoundModel(
        checkpoint=found,
        tokenizer=tokenizer,
        sentences=sentences,
        devices=devices,
        dtype=dtype,
        fingerprint=fingerprint,
        threads=cpu_threads.share(
            instance_count=config.instances, thread_count=config.instance_threads, process_count=config.processes
        ),
        lock=os.memfd_create("device-lock") if config.processes > 1 else None,
    )


@contextlib.contextmanager
def _locked(file: int) -> Iterator[None]:
    """Waits until no other process is in such a block, or has ended in it."""
    import fcntl  # Not on Windows, where a server has one process.

    fcntl.lockf(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.lockf(file, fcntl.LOCK_UN)


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Logs how long the block took, if it raises nothing."""
    started = time.monotonic()
    yield
    log.info("%s in %.2f s", what, time.monotonic() - started)
