"""The memory of `layertap embed` while it writes a long file, and how fast it does.

A corpus of short texts, none like another, runs through the command as a user would run it, pooled, against a server
whose encoder costs nothing. The resident memory of the command is sampled, beside what it has done: the parts in its
folder, then the file that is put together from them. A file that is wrong, or memory above the bound, ends it with 1.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import servers
from texts import workload

BOUND_MB = 300.0
SAMPLE_S = 0.1
PART_TEXTS = 1024


@dataclass(frozen=True)
class Sample:
    """What was seen at one moment, in seconds since the start and MB."""

    at_s: float
    memory_mb: float
    text_count: int
    assembling: bool


def write_corpus(path: Path, count: int) -> None:
    known, _ = workload("short", 5000)
    with path.open("w") as file:
        for n, text in zip(range(count), itertools.cycle(known), strict=False):
            file.write(f"{text} {n}\n")


def samples(command: list[str], folder: Path) -> Iterator[Sample]:
    """Runs the command; yields what is seen until it ends."""
    process = psutil.Popen(command)
    started = time.perf_counter()
    while process.poll() is None:
        try:
            memory_mb = process.memory_info().rss / 2**20
            names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        except (psutil.NoSuchProcess, FileNotFoundError):
            break
        parts = sum(name.startswith("part-") and not name.endswith(".tmp") for name in names)
        assembling = any(name.startswith("output") for name in names)
        yield Sample(time.perf_counter() - started, memory_mb, parts * PART_TEXTS, assembling)
        time.sleep(SAMPLE_S)
    if code := process.wait(timeout=60):
        raise SystemExit(f"the command ended with {code}")


def row_count(path: Path) -> int:
    """Reads a file in a process of its own, as whoever has ordered it would."""
    code = "import sys, pyarrow.parquet as pq; print(pq.read_metadata(sys.argv[1]).num_rows)"
    return int(subprocess.check_output([sys.executable, "-c", code, str(path)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=1_000_000)
    parser.add_argument("--points", type=int, default=20, help="of the curve that is printed")
    parser.add_argument("--folder", type=Path, help="where corpus and file lie meanwhile [a temporary folder]")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, servers.stand_in() as server:
        corpus, output = Path(folder) / "corpus.txt", Path(folder) / "out.parquet"
        write_corpus(corpus, arguments.texts)
        command = [sys.executable, "-m", "layertap", "embed", str(corpus), "-o", str(output), "--pooling", "mean"]
        command += ["--target", server.address, "--part-texts", str(PART_TEXTS), "--no-progress"]
        started = time.perf_counter()
        seen = list(samples(command, output.with_name(output.name + ".parts")))
        seconds = time.perf_counter() - started
        rows, size_mb = row_count(output), output.stat().st_size / 2**20
    if rows != arguments.texts:
        raise SystemExit(f"wrong: {rows} rows of {arguments.texts}")
    most = max(seen, key=lambda one: one.memory_mb)
    print(f"{rows} short texts to {size_mb:.0f} MB of Parquet in {seconds:.1f} s, {rows / seconds:.0f} texts/s")
    print(f"the client: at most {most.memory_mb:.0f} MB (bound: {BOUND_MB:.0f}), sampled every {SAMPLE_S * 1e3:.0f} ms")
    print("  seconds   texts done   MB")
    for one in seen[:: max(1, len(seen) // arguments.points)]:
        what = "writing the file" if one.assembling else one.text_count
        print(f"  {one.at_s:7.1f}   {what:>16}   {one.memory_mb:.0f}")
    sys.exit(most.memory_mb > BOUND_MB)


if __name__ == "__main__":
    main()
