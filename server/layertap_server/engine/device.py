"""What torch's errors say of the device, in the server's own words.

Out of memory is told by type, but for the allocator of the CPU, which has none of its own. Whether a device is lost is
asked of the device itself: after an error that is there to stay, every further call to it fails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

import torch

from layertap_server.types import DeviceLostError, OutOfMemoryError

_CPU_ALLOCATOR: Final = "DefaultCPUAllocator"
_CUDA_NO_MEMORY: Final = 2
"""cudaErrorMemoryAllocation, which pinning host memory gives as an error like any other."""


@contextlib.contextmanager
def named(device: torch.device) -> Iterator[None]:
    """Raises errors of the block as what they are for the server; those it does not know stay as they are.

    Raises:
        OutOfMemoryError: There is no memory for what was asked.
        DeviceLostError: The device does not work any more.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as exc:
        raise OutOfMemoryError(f"no memory on {device}") from exc
    except RuntimeError as exc:
        if _CPU_ALLOCATOR in str(exc) or getattr(exc, "error_code", None) == _CUDA_NO_MEMORY:
            raise OutOfMemoryError(f"no memory on {device}") from exc
        if not _works(device):
            raise DeviceLostError(f"{device} does not work any more") from exc
        raise


def _works(device: torch.device) -> bool:
    """Asks a device whether it still answers."""
    if device.type == "cpu":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True
