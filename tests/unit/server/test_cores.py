"""How many cores a process may use, by the files of its cgroups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from layertap_server.cores import core_count

ALL = 8


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(ALL)))


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("own", "files", "count"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, ALL),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "1600000 100000\n"}, ALL),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "350000 100000\n"}, 3),
        ("0::/of/the/host\n", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/\n", {}, ALL),
        ("4:cpu,cpuacct:/c\n", {"cpu/c/cpu.cfs_quota_us": "200000\n", "cpu/c/cpu.cfs_period_us": "100000\n"}, 2),
        ("4:cpu:/host\n3:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, ALL),
    ],
)
def test_a_limit_of_the_cpu_counts_as_cores(own: str, files: dict[str, str], count: int, tmp_path: Path) -> None:
    write(tmp_path, {"own": own} | {f"cgroup/{name}": text for name, text in files.items()})
    assert core_count(cgroups=tmp_path / "cgroup", own=tmp_path / "own") == count


def test_without_cgroups_all_cores_count(tmp_path: Path) -> None:
    assert core_count(cgroups=tmp_path, own=tmp_path / "none") == ALL
