"""Serves the embedded model and opens the page that shows its layers, until Ctrl-C; run by `make explore`."""

from __future__ import annotations

import signal
import sys

from layertap.cli import main
from layertap_server.testing import running_server

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # So that the server is stopped too.
    with running_server("--log-level", "warning") as server:
        code = main(["explore", "--target", server.address, *sys.argv[1:]])
    sys.exit(0 if code == 130 else code)
