"""What `import layertap` and `layertap --version` take, in new processes with warm files, beside an empty one.

An import computes on one core and waits for nothing, so its processor time is its time on a quiet machine; what else
runs lengthens it little. The bound holds for the shortest run of `import layertap` less that of an empty interpreter.
Above the bound the command ends with 1.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from dataclasses import dataclass

BOUND_MS = 250.0
PROGRAMS = {
    "empty": ["-c", "pass"],
    "import numpy": ["-c", "import numpy"],
    "import layertap": ["-c", "import layertap"],
    "layertap --version": ["-m", "layertap", "--version"],
}


@dataclass(frozen=True)
class Run:
    """One process from its start to its end."""

    ms: float
    processor_ms: float


def measure(arguments: list[str], runs: int) -> list[Run]:
    times: list[Run] = []
    for _ in range(runs + 1):
        start, before = time.perf_counter(), _processor_s()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append(Run(ms=(time.perf_counter() - start) * 1e3, processor_ms=(_processor_s() - before) * 1e3))
    return times[1:]  # The first brings the files into memory.


def _processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    runs = parser.parse_args().runs
    found = {name: measure(arguments, runs) for name, arguments in PROGRAMS.items()}
    for name, times in found.items():
        shortest, processor = min(run.ms for run in times), min(run.processor_ms for run in times)
        print(f"{name:20}  shortest {shortest:5.0f} ms, {processor:5.0f} ms of a processor")
    own = min(run.processor_ms for run in found["import layertap"]) - min(run.processor_ms for run in found["empty"])
    print(f"import layertap takes {own:.0f} ms of its own; the bound is {BOUND_MS:.0f} ms")
    return int(own > BOUND_MS)


if __name__ == "__main__":
    sys.exit(main())
