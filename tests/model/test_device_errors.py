"""What a device may do to a server: break while it is tried, have no room, or refuse memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.simulated_gpu import SimulatedGpu
from torch.overrides import TorchFunctionMode

from layertap_server.app.server import App
from layertap_server.config import Config, ConfigError
from layertap_server.engine.encoder import Encoder
from layertap_server.engine.runtime import pin


class _Breaks(SimulatedGpu):
    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.alive = False
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nMore of it")


def test_a_trial_that_breaks_the_device_stops_the_server_with_the_next_step(tiny_folder: Path) -> None:
    config = Config(model_id=str(tiny_folder), port=0)

    def make(*arguments: Any, **options: Any) -> Encoder:
        return Encoder(*arguments, **{**options, "dtype": "bfloat16", "runtime": _Breaks()})

    with pytest.raises(ConfigError, match=r"\(graph of 64 rows: CUDA error: an illegal .* --dtype float32"):
        App(config, make_encoder=make)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("std::bad_alloc")], ids=["cuda", "cpu"]
)
def test_a_device_without_room_for_the_weights_stops_the_server_with_the_next_step(
    error: RuntimeError, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise error

    monkeypatch.setattr(torch, "cat", no_room)
    with pytest.raises(ConfigError, match="no memory on cpu for the weights; make room there"):
        App(Config(model_id=str(tiny_folder), port=0))


def test_a_gpu_that_torch_does_not_support_stops_the_server_with_the_next_step(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(*_: object, **__: object) -> Encoder:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nMore of it")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = Config(model_id=str(tiny_folder), device="cuda:0", port=0)
    with pytest.raises(ConfigError, match=r"not run on cuda:0 \(CUDA error: no kernel image .* --device cpu"):
        App(config, make_encoder=make)


def test_memory_that_cuda_refuses_leaves_no_error_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses(TorchFunctionMode):
        """Fails at the next kernel after a refusal, as cuda does."""

        error = False

        def cudaHostRegister(self, address: int, byte_count: int, flags: int) -> int:
            self.error = True
            return 2

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if self.error and func is torch.Tensor.fill_:
                self.error = False
                raise RuntimeError("CUDA error: out of memory")
            return func(*args, **(kwargs or {}))

    refuses = Refuses()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refuses)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with refuses:
        pin(torch.device("cpu"), memoryview(bytearray(8)))()
        assert torch.empty(1).fill_(3.0).item() == 3.0
