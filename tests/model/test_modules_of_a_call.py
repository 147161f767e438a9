"""What one unary call enters: few modules, so that a reader can follow it, and few functions, which is its cost."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from pathlib import Path
from types import FrameType

from support.in_process import serving

import layertap
import layertap_server
from layertap import Client

CLIENT, SERVER = Path(layertap.__file__).parent, Path(layertap_server.__file__).parent
MOST_OF_CLIENT, MOST_OF_SERVER = 10, 16
APART = {"app/lifecycle", "scheduler/batcher"}
MOST_FUNCTION_CALLS = 170
"""Calls of the server's own Python functions, those of the engine apart. A call costs a server about 0.3 µs of each."""
MOST_FUNCTION_CALLS_OF_CLIENT = 60
"""The same of the client; a call costs a client about 1 µs of each."""
CALLS = 20


class Entered:
    """How often the functions of each file run, in all threads that start inside the block and in this one."""

    def __init__(self) -> None:
        self.files: Counter[str] = Counter()

    def __enter__(self) -> Entered:
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        threading.setprofile(None)
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            self.files[frame.f_code.co_filename] += 1

    def modules(self, package: Path) -> dict[str, int]:
        """Returns how often functions of each module of a package ran; modules are paths without their suffix."""
        files = {Path(file): count for file, count in list(self.files.items())}  # Other threads still add to them.
        return {
            str(path.relative_to(package).with_suffix("")): count
            for path, count in files.items()
            if path.is_relative_to(package)
        }


def test_one_unary_call_enters_few_modules(tiny_folder: Path) -> None:
    with Entered() as entered, serving(tiny_folder, instances=1) as address, Client(address) as client:
        for _ in range(2):  # What is computed once, such as the plan of these options, costs the first call alone.
            client.embed("a b c", pooling="mean")
        entered.files.clear()
        client.embed("d e f", pooling="mean")
        client_modules, server_modules = entered.modules(CLIENT), entered.modules(SERVER)
    # `types` are values; the engine counts as one; the timer that looks for instances that hang is no part of a call.
    apart = {name for name in server_modules if name.startswith("types/")} | APART
    rooms = {"engine" if name.startswith("engine/") else name for name in server_modules.keys() - apart}
    assert {"engine", "rpc/service", "model/tokenizer", "scheduler/call_queue", "protocol/responses"} <= rooms
    assert len(rooms) <= MOST_OF_SERVER, sorted(rooms)
    assert {"client", "wire", "_transport/transport"} <= client_modules.keys()
    assert len(client_modules) <= MOST_OF_CLIENT, sorted(client_modules)


def test_one_unary_call_runs_few_functions(tiny_folder: Path) -> None:
    with Entered() as entered, serving(tiny_folder, instances=1) as address, Client(address) as client:
        for _ in range(2):
            client.embed("a b c", pooling="mean")
        entered.files.clear()
        for _ in range(CALLS):
            client.embed("d e f", pooling="mean")
        of_server, of_client = entered.modules(SERVER), entered.modules(CLIENT)
    counts = {
        name: count / CALLS for name, count in of_server.items() if not name.startswith("engine/") and name not in APART
    }
    assert sum(counts.values()) <= MOST_FUNCTION_CALLS, sorted(counts.items(), key=lambda one: -one[1])
    # What both ends use, such as the errors and the names on the wire, is counted here too.
    assert sum(of_client.values()) / CALLS <= MOST_FUNCTION_CALLS_OF_CLIENT, of_client
