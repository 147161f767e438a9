"""One command for a machine with a GPU: is it right, how fast is it, what would be faster; writes results as it goes.

Three stages, each a process with a time limit of its own: *check* (3 min), *measure* (5 min), *tune* (5 min). It needs
torch, transformers, sentence-transformers, grpcio, protobuf, pytest and psutil; what else it imports can lie beside it
as wheels (`make gpu-wheels`, then `--wheels .wheels`). Run it as

    python3 bench/gpu.py --out results --wheels .wheels

and `--device cpu --quick` where there is no GPU, to try the script.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIMITS_S = {"check": 180, "measure": 300, "tune": 300}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="check, measure, tune; all by default")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and little work, to try the script")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="a folder for the results and logs")
    parser.add_argument("--wheels", type=Path, help="a folder of pure-Python wheels to import from")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.stages) - set(LIMITS_S):
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; there are {', '.join(LIMITS_S)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, _paths(arguments.wheels)))}
    failed = []
    for stage in arguments.stages or LIMITS_S:
        if not _run(stage, arguments, environment):
            failed.append(stage)
    print(_table(arguments.out))
    if failed:
        sys.exit(f"not done: {', '.join(failed)}; the logs in {arguments.out} say why")


def _paths(wheels: Path | None) -> list[Path]:
    repository = HERE.parent
    found = sorted(wheels.resolve().glob("*.whl")) if wheels else []
    return [repository / "client", repository / "server", HERE, *found]


def _run(stage: str, arguments: argparse.Namespace, environment: dict[str, str]) -> bool:
    """Runs a stage; returns whether it ended by itself, without an error and in time."""
    command = [sys.executable, str(HERE / f"gpu_{stage}.py"), "--device", arguments.device]
    command += ["--results", str((arguments.out / f"{stage}.jsonl").resolve())]
    command += ["--quick"] if arguments.quick else []
    started = time.monotonic()
    with (arguments.out / f"{stage}.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            code: int | str = process.wait(timeout=LIMITS_S[stage])
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = "stopped at its limit"
    print(f"{stage}: {code}, {time.monotonic() - started:.0f} s", flush=True)
    return code == 0


def _table(out: Path) -> str:
    lines = ["", "| what | figure | ratio | required |", "|---|---|---|---|"]
    for stage in LIMITS_S:
        path = out / f"{stage}.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            found = json.loads(line)
            cells = [found["what"], *(_cell(found[key]) for key in ("figure", "ratio", "required"))]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: float | str | None) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value).replace("\n", "<br>")


if __name__ == "__main__":
    main()
