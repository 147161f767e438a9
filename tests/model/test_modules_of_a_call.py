"""The modules that one unary call enters: few enough for a reader to follow it from end to end."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import FrameType

from support.in_process import serving

import layertap
import layertap_server
from layertap import Client

CLIENT, SERVER = Path(layertap.__file__).parent, Path(layertap_server.__file__).parent
MOST_OF_CLIENT, MOST_OF_SERVER = 10, 16


class Entered:
    """Files whose functions run, in all threads that start inside the block and in this one."""

    def __init__(self) -> None:
        self.files: set[str] = set()

    def __enter__(self) -> Entered:
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        threading.setprofile(None)
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            self.files.add(frame.f_code.co_filename)

    def modules(self, package: Path) -> set[str]:
        """Returns the modules of a package, as paths without their suffix."""
        paths = map(Path, list(self.files))  # Other threads still add to them.
        return {str(path.relative_to(package).with_suffix("")) for path in paths if path.is_relative_to(package)}


def test_one_unary_call_enters_few_modules(tiny_folder: Path) -> None:
    with Entered() as entered, serving(tiny_folder, instances=1) as address, Client(address) as client:
        for _ in range(2):  # What is computed once, such as the plan of these options, costs the first call alone.
            client.embed("a b c", pooling="mean")
        entered.files.clear()
        client.embed("d e f", pooling="mean")
        client_modules, server_modules = entered.modules(CLIENT), entered.modules(SERVER)
    # `types` are values; the engine counts as one; the timer that looks for instances that hang is no part of a call.
    apart = {name for name in server_modules if name.startswith("types/")} | {"app/lifecycle", "scheduler/instances"}
    rooms = {"engine" if name.startswith("engine/") else name for name in server_modules - apart}
    assert {"engine", "rpc/service", "model/tokenizer", "scheduler/call_queue", "protocol/responses"} <= rooms
    assert len(rooms) <= MOST_OF_SERVER, sorted(rooms)
    assert {"client", "wire", "_transport/transport"} <= client_modules
    assert len(client_modules) <= MOST_OF_CLIENT, sorted(client_modules)
