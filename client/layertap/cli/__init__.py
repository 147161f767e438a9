"""The command `layertap`: tokenize, decode, embed, info and health from a shell.

Rules: answers go to stdout, lines on what went wrong to stderr. With `--json` each answer is one JSON object on a line
of its own. `embed` sends texts as they are read, so a pipe may bring any number. Exit codes are in `help`. Knows no
more of the server than any user of `Client` does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from layertap import wire
from layertap.cli import arguments
from layertap.cli.parsing import UsageError
from layertap.errors import LayertapError
from layertap.jobs.refusal import JobError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    args = arguments.build().parse_args(argv)
    wire.keep_pages()
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read us has left, as `head` does; nothing may be flushed into the pipe when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except UnicodeError:
        code, message = 1, "stdin or stdout is not UTF-8; convert the text, or set PYTHONUTF8=1"
    except (UsageError, JobError, ImportError) as exc:
        code, message = 2, str(exc)
    except (LayertapError, OSError) as exc:
        code, message = 1, str(exc)
    print(f"layertap: {message}", file=sys.stderr)
    return code
