"""Serves the embedded model and opens the page that shows its layers, until Ctrl-C; run by `make explore`."""

from __future__ import annotations

import sys

from layertap.cli import main
from layertap_server.testing import running_server

if __name__ == "__main__":
    with running_server("--log-level", "warning") as server:
        code = main(["explore", "--target", server.address, *sys.argv[1:]])
    sys.exit(0 if code == 130 else code)
