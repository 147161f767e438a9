"""A stand-in for an accelerator: the engine's paths for one, on the CPU, under the most hostile schedule it allows.

Copies to the host happen only when they are waited for, memory that was copied from is overwritten, and memory of the
host starts as garbage. On torch's `meta` device, which has shapes and no numbers, it shows which operators run where.
So it does with fake tensors of a cuda device, for which torch also takes cuda's ways and checks what they are given.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
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
            device: "cpu", or for shapes alone "meta", or "cuda:0" inside `fake_cuda`.
            prefers_fast: Whether its clock finds the second of two ways faster; else slower.
            varlen: Whether it has variable-length attention.
        """
        self.device = torch.device(device)
        self._has_numbers = self.device.type == "cpu"
        self.varlen_attention: VarlenAttention | None = None
        if varlen:  # Torch's own operator has shapes, but no numbers on a CPU.
            attention = _varlen if self._has_numbers else varlen_attention()
            assert attention is not None
            self.varlen_attention = _checked(attention)
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
        if self._has_numbers:
            sent.copy_(host)
        host.fill_(GARBAGE)
        return sent

    def to_host(self, copies: Copies) -> Arrival:
        self.downloads += 1
        assert all(host.shape == sent.shape and host.dtype == sent.dtype for host, sent in copies)
        assert {(host.device.type, sent.device.type) for host, sent in copies} == {("cpu", self.device.type)}
        if not self._has_numbers:
            with unset_fake_temporarily():
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
        return Runtime.difference(self, found, wanted) if self._has_numbers else 0.0

    def seconds(self, work: Callable[[], object]) -> float:
        work()
        self._seconds *= self._pace
        return self._seconds


def _checked(attention: VarlenAttention) -> VarlenAttention:
    """Returns attention that refuses what the kernel of a device refuses, and operators without one do not look at."""

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int
    ) -> torch.Tensor:
        for one in (query, key, value):
            assert one.dtype in (torch.bfloat16, torch.float16) and one.shape == query.shape
            assert one.ndim == 3 and one.stride(-1) == 1 and one.shape[-1] % 8 == 0 and one.shape[-1] <= 256
        assert bounds.dtype is torch.int32 and bounds.is_contiguous() and bounds.device == query.device
        assert len(bounds) > 1 and type(longest) is int and longest > 0
        return attention(query, key, value, bounds, longest)

    return attend


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


class _WithoutCuda(TorchFunctionMode):
    """Does by operators what a torch without cuda refuses to do with fake tensors of it before it asks them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__getitem__:
            return _part(*args)
        if func is torch.Tensor.__setitem__:
            return _part(*args[:2]).copy_(args[2])
        if func is torch.Tensor.contiguous:
            return torch.clone(args[0], memory_format=torch.contiguous_format)
        if func is torch.tensor:
            return torch.empty(len(args[0]), **kwargs)
        if func is torch.Tensor.numpy:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _part(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    dim = 0
    for one in index if isinstance(index, tuple) else (index,):
        if isinstance(one, slice):
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, one.start, one.stop)
        elif one is None:
            tensor = tensor.unsqueeze(dim)
        else:
            tensor, dim = tensor.select(dim, one), dim - 1
        dim += 1
    return tensor


@contextlib.contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gives the block a cuda device whose tensors have shapes and strides, and no numbers."""

    def real(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **kwargs: Any) -> Any:
            with unset_fake_temporarily(), torch._C.DisableTorchFunction():
                return make(*args, **kwargs)

        return made

    def load_shapes(path: Path) -> dict[str, torch.Tensor]:
        return {name: torch.empty(one.shape, dtype=one.dtype) for name, one in load_file(path).items()}

    load_file = real(safetensors.torch.load_file)
    monkeypatch.setattr(safetensors.torch, "load_file", load_shapes)
    for name in ("frombuffer", "from_numpy"):  # The host's own memory has numbers.
        monkeypatch.setattr(torch, name, real(getattr(torch, name)))
    with _WithoutCuda(), FakeTensorMode(allow_non_fake_inputs=True):
        yield


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
        if "scaled_dot_product_attention" in str(func):
            _check_mask(args[0], kwargs.get("attn_mask", args[3] if len(args) > 3 else None))
        result = func(*args, **kwargs)
        devices = {one.device.type for one in _tensors([args, kwargs, result]) if one.ndim or one.device.type != "cpu"}
        assert len(devices) < 2, f"{func} mixes {sorted(devices)}"
        self.operators += self._device in devices
        return result


def _check_mask(query: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Refuses a mask that the kernel of a device would not take, so that torch would copy it or take its slow way."""
    if mask is not None:
        assert mask.dtype is query.dtype and mask.shape == (*query.shape[:3], query.shape[2])
        assert mask.stride(-1) == 1 and all(stride % 8 == 0 for stride in mask.stride()[:-1])


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
