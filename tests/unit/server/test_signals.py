"""Signals before the server listens: each ends the process at once, with the exit code that says which it was."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from layertap_server import signals

WAIT_S = 60.0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGHUP, 0)])
def test_a_signal_among_the_first_imports_ends_the_process(number: signal.Signals, code: int) -> None:
    # Each import is a line of stderr; asyncio is one of the first after the signals have their handlers.
    command = [sys.executable, "-X", "importtime", "-m", "layertap_server", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any(line.split()[-1] == "asyncio" for line in process.stderr)
        process.send_signal(number)
        printed, logged = process.communicate(timeout=WAIT_S)
        assert process.returncode == code and not printed and "Traceback" not in logged


def test_hangups_stay_ignored_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signals.stopping() == [signal.SIGTERM, signal.SIGINT]
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signals.stopping() == [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
