"""What the engine asks of an accelerator beside tensors: host memory, copies, events, graphs and a clock.

A CPU has no runtime: its tensors are the host's own. Everything that behaves otherwise on an accelerator goes through a
`Runtime`, so that the tests can run the same paths on a stand-in with its methods. Nothing waits for a whole device.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import numpy as np
import torch

from layertap_server.engine import device as devices
from layertap_server.engine.pinned_memory import PinnedMemory

log = logging.getLogger(__name__)

Copies = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Pairs of a tensor in host memory and the tensor of the device that it gets."""
VarlenAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
"""Query, key, value (shape of each: [row_count, head_count, head_size]), bounds of the texts (shape: [text_count + 1],
int32) and the length of the longest, to the attended values. Shape: [row_count, head_count, head_size]."""

_CLOCK_ROUNDS: Final = 5
_CLOCK_SECONDS: Final = 2e-3
"""A timing repeats work for so long, so that the device need not wait for the host between the runs."""
_MOST_REPEATS: Final = 64


class Arrival(Protocol):
    """A point in the work of a device; torch's events are one."""

    def query(self) -> bool:
        """Whether the device has passed it."""

    def synchronize(self) -> None:
        """Waits until the device has passed it."""


class Runtime:
    """One accelerator.

    Copies to the host run in a stream beside each queue, so that the rows of a small batch do not wait for those of a
    large one.

    Attributes:
        device: What torch calls it.
        trial_rows: How many rows keep it busy: trials compare two ways with so many.
        varlen_attention: Attention over texts of many lengths in one launch. None: the device has none.
    """

    trial_rows = 32_768

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.varlen_attention = varlen_attention()
        self._copies: dict[torch.cuda.Stream, torch.cuda.Stream] = {}
        self._memory = PinnedMemory(functools.partial(pin, device))
        # cuDNN's attention makes a plan for each shape, tens of milliseconds long, and batches have any shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
        # Images may turn TF32 on by a variable of the environment; float32 would be off by 1e-3.
        torch.set_float32_matmul_precision("highest")

    def host_memory(self, byte_count: int) -> memoryview:
        """Returns host memory that the device copies to and from without waiting."""
        return self._memory.allocate(byte_count)

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        """Starts to copy host memory of this runtime to the device; what is queued next finds it there."""
        return host.to(self.device, non_blocking=True)

    def to_host(self, copies: Copies) -> Arrival:
        """Starts to copy what is computed so far; later work does not wait. Both sides must live until it is done."""
        queue = torch.cuda.current_stream(self.device)
        beside = self._copies.get(queue)
        if beside is None:
            beside = self._copies[queue] = _stream(self.device)
        beside.wait_stream(queue)
        with torch.cuda.stream(beside):
            for host, sent in copies:
                host.copy_(sent, non_blocking=True)
            return _event(beside)

    def queue(self) -> contextlib.AbstractContextManager[object]:
        """Returns a queue of the device's work for one thread: what is queued inside runs beside other queues' work."""
        return torch.cuda.stream(_stream(self.device))

    def reached(self) -> Arrival:
        """Returns the point in this thread's queue up to which everything is queued now."""
        return _event(torch.cuda.current_stream(self.device))

    def selected(self) -> contextlib.AbstractContextManager[object]:
        """Returns what makes it the device of work that names none."""
        return torch.cuda.device(self.device)

    def works(self) -> bool:
        """Returns whether the device still answers; see `device.works`."""
        return devices.works(self.device)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records the device's part of some work, which must be the same each time; returns what repeats it."""
        graph = torch.cuda.CUDAGraph()
        queue = torch.cuda.stream(torch.cuda.current_stream(self.device))  # A failed recording would stay in its own.
        # Other threads may use the device meanwhile: the metrics ask for its memory.
        with queue, torch.cuda.graph(graph, stream=_stream(self.device), capture_error_mode="thread_local"):
            work()
        return graph.replay

    def difference(self, found: torch.Tensor, wanted: torch.Tensor) -> float:
        """Returns the largest difference as a part of the largest wanted value; NaN if either has one. Any shape."""
        wanted = wanted.float()
        return float((found.float() - wanted).abs().max() / wanted.abs().max())

    def seconds(self, work: Callable[[], object]) -> float:
        """Returns how long the device takes for some work: the median of several runs, after one that is not timed."""
        self._timed(work, 1)  # The first run may load kernels.
        repeats = max(1, min(_MOST_REPEATS, int(_CLOCK_SECONDS / max(self._timed(work, 1), 1e-6))))
        return float(np.median([self._timed(work, repeats) for _ in range(_CLOCK_ROUNDS)]))

    def _timed(self, work: Callable[[], object], repeats: int) -> float:
        """Returns how long the device takes for one of so many runs, in seconds."""
        stream = torch.cuda.current_stream(self.device)
        started = _event(stream, timed=True)
        for _ in range(repeats):
            work()
        ended = _event(stream, timed=True)
        ended.synchronize()
        milliseconds: float = started.elapsed_time(ended)
        return milliseconds / 1e3 / repeats


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # Torch gives it no types.


def _event(stream: torch.cuda.Stream, *, timed: bool = False) -> torch.cuda.Event:
    # A thread that waits sleeps: else each instance would keep a core busy while the device computes.
    event = torch.cuda.Event(enable_timing=timed, blocking=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def pin(device: torch.device, memory: memoryview) -> Callable[[], None]:
    """Registers host memory with cuda, so that every device copies straight into it; returns what undoes that.

    Memory that cuda refuses stays what it is: copies into it are right, but slower. Cuda also keeps the error for the
    next kernel of the thread, which would fail with it; so one runs here, and clears it.

    Args:
        device: A device that is in use: registering sets up the selected one, which takes memory of it.
        memory: What to register.
    """
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = np.frombuffer(memory, np.uint8).ctypes.data
    portable = 1
    with torch.cuda.device(device):
        code = int(runtime.cudaHostRegister(address, memory.nbytes, portable))
        if code:
            with contextlib.suppress(RuntimeError):
                torch.empty(1, device=device).fill_(1.0)
    if code:
        log.warning(
            "cuda does not register %d bytes of host memory (error %d); copies into them will be slower",
            memory.nbytes,
            code,
        )
        return lambda: None

    def unpin() -> None:
        with torch.cuda.device(device):
            runtime.cudaHostUnregister(address)

    return unpin


def varlen_attention() -> VarlenAttention | None:
    """Returns torch's variable-length flash attention. None: it has none.

    Its operator is called, which torch names private, because it is in more releases than the function around it, and
    the function takes the host longer than the kernel the device.
    """
    try:
        operator = torch.ops.aten._flash_attention_forward.default
        has_splits = any(argument.name == "num_splits" for argument in operator._schema.arguments)
    except AttributeError:
        return None
    # One split makes the order of sums, and so the bits, independent of what else is in the batch.
    options = {"num_splits": 1} if has_splits else {}

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int
    ) -> torch.Tensor:
        dropout, causal, debug = 0.0, False, False
        found = operator(query, key, value, bounds, bounds, longest, longest, dropout, causal, debug, **options)
        result: torch.Tensor = found[0]
        return result

    return attend
