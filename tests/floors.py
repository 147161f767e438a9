"""Runs the client on other versions of what it requires: the tests that need no server, then a user's program with one.

Run by `make test-floors` and `make test-newest` as `floors.py FOLDER`; the packages in FOLDER come before those of the
environment. The server keeps the environment's own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support import running

TESTS = Path(__file__).parent
PURE = ("test_wire.py", "protocol", "results")
VERSIONS = """
import google.protobuf, grpc, numpy
for one in (numpy, grpc, google.protobuf):
    print(one.__name__, one.__version__, one.__file__)
"""


def main(folder: str) -> int:
    path = os.pathsep.join(filter(None, (str(Path(folder).resolve()), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path}

    def python(*arguments: str) -> int:
        return subprocess.run([sys.executable, *arguments], env=environment, check=False).returncode

    if code := python("-c", VERSIONS) or python(
        "-m", "pytest", "-q", *(str(TESTS / "unit" / "client" / name) for name in PURE)
    ):
        return code
    with running() as server:
        return python("-W", "error", str(TESTS / "typing" / "sample.py"), server.address, "--without-extras")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
