"""`layertap-server`, which is also `python -m layertap_server`: signals work before anything large is imported."""

from __future__ import annotations

import sys

from layertap_server import signals


def main() -> int:
    """Runs the command in this process; returns its exit code."""
    signals.install()
    from layertap_server import cli
    from layertap_server.observability.bounded_streams import open_descriptors

    open_descriptors()
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
