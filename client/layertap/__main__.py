"""The command `layertap`, also as `python -m layertap`."""

import os
import sys
from typing import NoReturn

from layertap import cli


def main() -> NoReturn:
    """Runs the command, and ends the process with its exit code: nothing of gRPC is left that could hold up the end."""
    code = cli.main()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
