"""What the engine asks of an accelerator beside tensors: host memory, copies, events, graphs and a clock.

A CPU has no runtime: its tensors are the host's own. Everything that behaves otherwise on an accelerator goes through a
`Runtime`, so that a stand-in can run the same paths where there is none. Nothing here waits for a whole device.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import numpy as np
import torch

from layertap_server.engine.pinned_memory import PinnedMemory

log = logging.getLogger(__name__)

Copies = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Pairs of a tensor in host memory and the tensor of the device that it gets."""
VarlenAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
"""Query, key, value (shape of each: [row_count, head_count, head_size]), bounds of the texts (shape: [text_count + 1],
int32) and the length of the longest, to the attended values. Shape: [row_count, head_count, head_size]."""

_CLOCK_ROUNDS: Final = 5


class Arrival(Protocol):
    """A point in the work of a device; torch's events are one."""

    def query(self) -> bool:
        """Whether the device has passed it."""

    def synchronize(self) -> None:
        """Waits until the device has passed it."""


class Runtime(Protocol):
    """One accelerator.

    Attributes:
        device: What torch calls it.
        varlen_attention: Attention over texts of many lengths in one launch. None: the device has none.
    """

    device: torch.device
    varlen_attention: VarlenAttention | None

    def host_memory(self, byte_count: int) -> memoryview:
        """Returns host memory that the device copies to and from without waiting."""

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        """Starts to copy host memory of this runtime to the device; what is queued next finds it there."""

    def to_host(self, copies: Copies) -> Arrival:
        """Starts to copy what is computed so far; later work does not wait. Both sides must live until it is done."""

    def queue(self) -> contextlib.AbstractContextManager[object]:
        """Returns a queue of the device's work for one thread: what is queued inside runs beside other queues' work."""

    def reached(self) -> Arrival:
        """Returns the point in this thread's queue up to which everything is queued now."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records the device's part of some work, which must be the same each time; returns what repeats it."""

    def difference(self, found: torch.Tensor, wanted: torch.Tensor) -> float:
        """Returns the largest difference from what is wanted, as a part of the largest value; waits for the device."""

    def seconds(self, work: Callable[[], object]) -> float:
        """Returns how long the device takes for some work: the median of several runs, after one that is not timed."""


class CudaRuntime:
    """One cuda device; implements `Runtime`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.varlen_attention = _varlen_attention()
        # Torch gives neither streams nor events the types of their arguments.
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._memory = PinnedMemory(pin)
        self.host_memory = self._memory.allocate

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        """See `Runtime`."""
        return host.to(self.device, non_blocking=True)

    def to_host(self, copies: Copies) -> Arrival:
        """See `Runtime`."""
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            for host, sent in copies:
                host.copy_(sent, non_blocking=True)
            return _event(self._copies)

    def queue(self) -> contextlib.AbstractContextManager[object]:
        """See `Runtime`."""
        return torch.cuda.stream(torch.cuda.Stream(self.device))  # type: ignore[no-untyped-call]

    def reached(self) -> Arrival:
        """See `Runtime`."""
        return _event(torch.cuda.current_stream(self.device))

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `Runtime`."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(self.device)):  # type: ignore[no-untyped-call]
            work()
        return graph.replay

    def difference(self, found: torch.Tensor, wanted: torch.Tensor) -> float:
        """See `Runtime`."""
        return relative_difference(found, wanted)

    def seconds(self, work: Callable[[], object]) -> float:
        """See `Runtime`."""
        work()
        stream = torch.cuda.current_stream(self.device)
        times = []
        for _ in range(_CLOCK_ROUNDS):
            started = _event(stream, timed=True)
            work()
            ended = _event(stream, timed=True)
            ended.synchronize()
            times.append(started.elapsed_time(ended) / 1e3)
        return float(np.median(times))


def relative_difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Returns the largest difference as a part of the largest wanted value; NaN if either has one. Any shape."""
    wanted = wanted.float()
    return float((found.float() - wanted).abs().max() / wanted.abs().max())


def _event(stream: torch.cuda.Stream, *, timed: bool = False) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def pin(memory: memoryview) -> Callable[[], None]:
    """Registers host memory with cuda, so that every device copies straight into it; returns what undoes that.

    Memory that cuda refuses stays what it is: copies into it are right, but slower.
    """
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = np.frombuffer(memory, np.uint8).ctypes.data
    portable = 1
    if int(runtime.cudaHostRegister(address, memory.nbytes, portable)):
        log.warning("cuda does not register %d bytes of host memory; copies into them will be slower", memory.nbytes)
        return lambda: None

    def unpin() -> None:
        runtime.cudaHostUnregister(address)

    return unpin


def _varlen_attention() -> VarlenAttention | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int
    ) -> torch.Tensor:
        # One split makes the order of sums, and so the bits, independent of what else is in the batch.
        result: torch.Tensor = attention(query, key, value, bounds, bounds, longest, longest, **options)
        return result

    attention: Any = varlen_attn  # Its options differ from torch to torch.
    options = {"num_splits": 1} if "num_splits" in (varlen_attn.__kwdefaults__ or {}) else {}
    return attend
