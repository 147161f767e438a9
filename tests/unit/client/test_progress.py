"""The progress bar: drawn when asked for, absent without a terminal, and a clear error without tqdm."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import pytest

from layertap import progress


class Screen(io.StringIO):
    """A stderr that says what it is."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def drawn(monkeypatch: pytest.MonkeyPatch, screen: Screen | None, **options: Any) -> str:
    """Returns what a job of three steps leaves on the screen."""
    monkeypatch.setattr(sys, "stderr", screen)
    with progress.bar(**{"total": 3, "shown": None} | options) as advance:
        advance(1)
        advance(2)
    return screen.getvalue() if screen else ""


@pytest.mark.parametrize("terminal", [True, False])
def test_a_requested_bar_is_drawn_on_any_output(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    last = drawn(monkeypatch, Screen(terminal), shown=True).split("\r")[-1]
    assert last.startswith("100%") and "3/3" in last and "texts/s" in last


@pytest.mark.parametrize(("terminal", "shown"), [(True, False), (False, False), (False, None)])
def test_a_bar_is_not_drawn_where_it_is_not_wanted(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, shown: bool | None
) -> None:
    assert drawn(monkeypatch, Screen(terminal), shown=shown) == ""


def test_a_process_without_stderr_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(monkeypatch, None) == ""


@pytest.mark.parametrize(("delay_s", "seen"), [(0.0, True), (3600.0, False)])
def test_on_a_terminal_a_bar_comes_by_itself_once_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, delay_s: float, seen: bool
) -> None:
    monkeypatch.setattr(progress, "_UNASKED_DELAY_S", delay_s)
    assert ("3/3" in drawn(monkeypatch, Screen(True))) == seen


def test_what_was_done_before_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "10/10" in drawn(monkeypatch, Screen(False), shown=True, total=10, done=7)


def test_without_a_total_count_and_rate_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    last = drawn(monkeypatch, Screen(False), shown=True, total=None).split("\r")[-1]
    assert last.startswith("3 texts ") and "%" not in last


def test_without_tqdm_only_a_bar_that_is_asked_for_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tqdm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    assert drawn(monkeypatch, Screen(True)) == ""
    with (
        pytest.raises(ModuleNotFoundError, match=r"layertap\[progress\]"),
        progress.bar(total=1, shown=True),
    ):
        pass


def test_importing_layertap_loads_no_tqdm() -> None:
    code = "import sys, layertap, layertap.progress; print('tqdm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr
