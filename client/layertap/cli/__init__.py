"""The command `layertap`: tokenize, decode, embed, encode, info and health from a shell.

Rules: answers go to stdout, messages to stderr. With `--json` each answer is one JSON object on a line of its own.
Whatever comes from files, servers and models is escaped before it reaches a terminal. Texts are sent as they are read,
so that a pipe may bring any number. The exit codes are in `arguments`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from layertap import wire
from layertap.cli.parsing import UsageError, drop_stdout, reason, warn
from layertap.errors import LayertapError
from layertap.jobs import JobError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    _open_standard_streams()
    # gRPC's C core would add lines of its own to ours, such as one for each server that stops. It is asked as it is
    # imported, which `arguments` does.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from layertap.cli import arguments

    args = arguments.build().parse_args(argv)
    wire.keep_pages()
    try:
        code: int = args.run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        drop_stdout()
        return 141
    except KeyboardInterrupt:
        return 130
    except UnicodeEncodeError:
        code, message = 1, "stdout cannot show what is not ASCII; use --json, or set PYTHONUTF8=1"
    except (UsageError, JobError, ImportError) as exc:
        code, message = 2, str(exc)
    except LayertapError as exc:
        code, message = 1, str(exc)
    except OSError as exc:
        drop_stdout()  # It may be what failed, and would fail again when the interpreter flushes it.
        code, message = 1, reason(exc)
    warn(message)
    return code


def _open_standard_streams() -> None:
    """Opens the null device for standard streams that are closed, or the next file would get their number."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
