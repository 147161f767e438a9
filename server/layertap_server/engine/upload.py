"""Everything that a batch needs on its device, sent as one.

Each copy from ordinary host memory makes the host wait for the device, and each small copy costs a launch. So ids,
positions, bounds, masks and the rows to pool are all known and added before the first layer is queued; they lie in one
piece of pinned memory and go in one copy, which the host does not wait for.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from layertap_server.engine.runtime import Arrival, Runtime

_ALIGNMENT: Final = 16


class Sent:
    """One array of an upload.

    Attributes:
        tensor: The array on the device, in its shape and dtype; there is none before `Upload.send`.
    """

    __slots__ = ("tensor",)

    tensor: torch.Tensor


class Upload:
    """The arrays of one batch; without a runtime the CPU uses them where they are."""

    def __init__(self, runtime: Runtime | None) -> None:
        self._runtime = runtime
        self._parts: list[tuple[npt.NDArray[Any], Sent]] = []
        self._memory: memoryview | None = None  # Must not be lent to anything else before it has arrived.
        self._arrival: Arrival | None = None

    def add(self, array: npt.NDArray[Any]) -> Sent:
        """Adds an array of any shape; it may be read from the device after `send`."""
        assert self._arrival is None, "a batch has one upload"
        sent = Sent()
        if self._runtime is None:
            sent.tensor = torch.from_numpy(array)
        else:
            self._parts.append((np.ascontiguousarray(array), sent))
        return sent

    def send(self) -> None:
        """Starts the copy."""
        if self._runtime is None or not self._parts:
            return
        starts, end = [], 0
        for array, _ in self._parts:
            starts.append(end)
            end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._memory = self._runtime.host_memory(max(end, _ALIGNMENT))
        host = np.frombuffer(self._memory, np.uint8)
        for start, (array, _) in zip(starts, self._parts, strict=True):
            host[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        whole = self._runtime.to_device(torch.from_numpy(host))
        self._arrival = self._runtime.reached()
        for start, (array, sent) in zip(starts, self._parts, strict=True):
            part = whole[start : start + array.nbytes]
            sent.tensor = part.view(torch.from_numpy(array).dtype).view(array.shape)
        self._parts.clear()

    def wait(self) -> None:
        """Waits until the copy is over; its host memory may be lent anew then."""
        if self._arrival is not None:
            self._arrival.synchronize()
        self._memory = None
