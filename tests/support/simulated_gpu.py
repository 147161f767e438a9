"""A stand-in for an accelerator: the engine's paths for one, on the CPU, under the most hostile schedule it allows.

Copies to the host happen only when they are waited for, memory that was copied from is overwritten, and memory of the
host starts as garbage. On torch's `meta` device, which has shapes and no numbers, it shows which operators run where.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from layertap_server.engine.pinned_memory import PinnedMemory
from layertap_server.engine.runtime import (
    Arrival,
    Copies,
    Runtime,
    VarlenAttention,
    varlen_attention,
)

GARBAGE = 0xA5


class _Copy:
    """A copy that has not happened before somebody asks for it."""

    def __init__(self, copies: Copies) -> None:
        self._copies = list(copies)

    def query(self) -> bool:
        return not self._copies

    def synchronize(self) -> None:
        for host, sent in self._copies:
            host.copy_(sent)
        self._copies.clear()


class _Point:
    """A point in the work of a device; waiting for it notes which replays are over."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        self._gpu, self._replays = gpu, gpu.replays

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self._gpu.replays_over = max(self._gpu.replays_over, self._replays)


class SimulatedGpu:
    """Stands in for `layertap_server.engine.runtime.Runtime`.

    Attributes:
        trial_rows: Few, so that trials are short.
        uploads: How many copies to the device there were.
        downloads: How many copies to the host.
        replays: How many times a recorded graph ran.
        replays_over: How many of those were waited for.
        alive: Whether it still answers.
    """

    trial_rows = 1024

    def __init__(self, device: str = "cpu", *, prefers_fast: bool = True, varlen: bool = True) -> None:
        """Makes a device.

        Args:
            device: "cpu", or "meta" for shapes alone.
            prefers_fast: Whether its clock finds the second of two ways faster; else slower.
            varlen: Whether it has variable-length attention.
        """
        self.device = torch.device(device)
        self.varlen_attention: VarlenAttention | None = None
        if varlen:  # Torch's own operator has shapes, but no numbers on a CPU.
            self.varlen_attention = varlen_attention() if device == "meta" else _varlen
        self.uploads = self.downloads = self.replays = self.replays_over = 0
        self.alive = True
        self._memory = PinnedMemory(lambda memory: lambda: None)
        self._pace = 0.5 if prefers_fast else 2.0
        self._seconds = 1.0

    def host_memory(self, byte_count: int) -> memoryview:
        memory = self._memory.allocate(byte_count)
        np.frombuffer(memory, np.uint8)[:] = GARBAGE
        return memory

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        self.uploads += 1
        sent = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        if self.device.type != "meta":
            sent.copy_(host)
        host.fill_(GARBAGE)
        return sent

    def to_host(self, copies: Copies) -> Arrival:
        self.downloads += 1
        if self.device.type == "meta":
            for host, _ in copies:
                host.zero_()
            copies = ()
        return _Copy(copies)

    def queue(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def reached(self) -> Arrival:
        return _Point(self)

    def works(self) -> bool:
        return self.alive

    def selected(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            self.replays += 1
            work()

        return replay

    def difference(self, found: torch.Tensor, wanted: torch.Tensor) -> float:
        assert found.shape == wanted.shape and found.dtype == wanted.dtype
        return 0.0 if self.device.type == "meta" else Runtime.difference(self, found, wanted)

    def seconds(self, work: Callable[[], object]) -> float:
        work()
        self._seconds *= self._pace
        return self._seconds


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int
) -> torch.Tensor:
    """Attends text by text; rows of no text hold NaN, as they may on a device."""
    out = torch.full_like(query, torch.nan)
    ends = bounds.tolist()
    for start, end in itertools.pairwise(ends):
        assert end - start <= longest
        if end > start:
            text = [one[start:end].transpose(0, 1) for one in (query, key, value)]
            out[start:end] = F.scaled_dot_product_attention(*text).transpose(0, 1)
    return out


class TransferCount(TorchDispatchMode):
    """Fails at operators that make the host wait for a device, or that mix devices.

    Attributes:
        operators: How many ran on the device.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert "local_scalar_dense" not in str(func) and "nonzero" not in str(func), f"{func} waits for the device"
        result = func(*args, **kwargs)
        devices = {one.device.type for one in _tensors([args, kwargs, result]) if one.ndim or one.device.type != "cpu"}
        assert len(devices) < 2, f"{func} mixes {sorted(devices)}"
        self.operators += self._device in devices
        return result


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
