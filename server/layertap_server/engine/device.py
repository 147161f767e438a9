"""Devices: which there are, their memory, and what torch's errors say of them.

Out of memory is known by its type, but for the allocator of the CPU, which has none of its own. Whether a device is
lost is asked of the device itself: after an error that is there to stay, every further call to it fails.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Final

import torch

from layertap_server.model.files import CheckpointError, reason_of
from layertap_server.types import DeviceLostError, OutOfMemoryError

log = logging.getLogger(__name__)

_NO_MEMORY: Final = ("DefaultCPUAllocator", "std::bad_alloc")
"""What the message of a RuntimeError has where a CPU has no memory: for a tensor, or beside one."""
_BFLOAT16_CAPABILITY: Final = (8, 0)
"""From this compute capability on, cuda devices multiply bfloat16 in tensor cores."""
_CUDA_NO_MEMORY: Final = 2
"""cudaErrorMemoryAllocation, which pinning host memory gives as an error like any other."""


def devices(wanted: str) -> list[str]:
    """Returns the devices to use, "cpu" or "cuda:N", each once.

    Args:
        wanted: "auto" (cuda if it is there), "cpu", "cuda" (all of them), or a list such as "cuda:0,cuda:1".

    Raises:
        CheckpointError: if a device is not there.
    """
    available = [f"cuda:{n}" for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if wanted == "auto":
        return available[:1] or ["cpu"]
    if wanted == "cpu":
        return ["cpu"]
    chosen = available if wanted == "cuda" else list(dict.fromkeys(wanted.split(",")))
    missing = [name for name in chosen if name not in available]
    if missing or not chosen:
        raise CheckpointError(
            f"--device {wanted} is not available: torch sees {', '.join(available) or 'no cuda device'}; "
            "use --device cpu"
        )
    return chosen


def compute_dtype(wanted: str, devices: Sequence[str]) -> str:
    """Returns the dtype to compute in. "auto" is bfloat16 where every device is a GPU that has it, else float32.

    CPUs with instructions for bfloat16 compute in it when it is named.

    Raises:
        CheckpointError: if float16 is wanted on the CPU.
    """
    if wanted == "float16" and "cpu" in devices:
        raise CheckpointError("--dtype is float16, which needs cuda; use float32 or bfloat16 on the CPU")
    if wanted != "auto":
        return wanted
    capable = all(name != "cpu" and torch.cuda.get_device_capability(name) >= _BFLOAT16_CAPABILITY for name in devices)
    return "bfloat16" if capable else "float32"


def memory(device: torch.device) -> dict[str, int]:
    """Returns the bytes of a device's memory: allocated, reserved, free and total. A CPU has no entries."""
    if device.type == "cpu":
        return {}
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:  # The device is lost, which its instance tells.
        return {}
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "free": free,
        "total": total,
    }


@contextlib.contextmanager
def named_errors(device: torch.device) -> Iterator[None]:
    """Raises errors of the block as what they are for the server; those it does not know stay as they are.

    Raises:
        OutOfMemoryError: if there is no memory for what was asked.
        DeviceLostError: if the device no longer works.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as exc:
        raise OutOfMemoryError(f"no memory on {device}") from exc
    except RuntimeError as exc:
        if any(words in str(exc) for words in _NO_MEMORY) or getattr(exc, "error_code", None) == _CUDA_NO_MEMORY:
            raise OutOfMemoryError(f"no memory on {device}") from exc
        if not works(device):
            raise DeviceLostError(f"{device} does not work any more ({reason_of(exc)})") from exc
        raise


def works(device: torch.device) -> bool:
    """Returns whether a device still answers. After an error that is there to stay, no call of the process does."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True
