"""How many cores a process may use: those it may run on, and no more than its cgroups give it time for.

A container's limit of the CPU is such a time. Threads for all cores of a large machine would use it up at once and then
wait for the next tenth of a second.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def core_count(*, cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Returns how many cores this process may keep busy, at least one.

    Args:
        cgroups: Where cgroups are mounted.
        own: The file that says which of them are those of this process.
    """
    return max(1, min(len(os.sched_getaffinity(0)), *(int(limit) for limit in _limits(cgroups, own))))


def _limits(cgroups: Path, own: Path) -> Iterator[float]:
    """Yields how many cores each cgroup of this process has time for, if it is limited."""
    yield float(1 << 20)
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            root = cgroups / "cpu" if controllers else cgroups
            # In a container the path may be that of the host, and the mounted root its own cgroup.
            folder = root / path.lstrip("/")
            for one in (folder, *folder.parents[: len(folder.parts) - len(root.parts)]):
                if (limit := _limit(one)) is not None:
                    yield limit


def _limit(folder: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError):  # Without a limit version 2 says max, and version 1 -1.
        if (both := folder / "cpu.max").exists():
            quota, period = map(int, both.read_text().split())
        else:
            quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / period if quota > 0 else None
    return None
