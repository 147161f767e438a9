"""`python -m layertap_server` is `layertap-server`."""

from __future__ import annotations

import sys

from layertap_server.cli import main

if __name__ == "__main__":
    sys.exit(main())
