"""What the commands share: texts and numbers from the command line, printing, and wrong usage."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal, cast

from layertap import wire
from layertap.client import Client
from layertap.errors import InvalidArgumentError, printable
from layertap.jobs import readers
from layertap.jobs.items import Fields
from layertap.jobs.readers import Arguments, Source
from layertap.jobs.shards import OUTPUTS, Shard, assign, find, is_pattern
from layertap.types import LayerMix, MixName, Windows

NO_TEXT: Final = "there is no text; pass some as arguments, a file, or lines of stdin"
SOME_ARE_BAD: Final = 3
"""The exit code if some items failed and the others are done."""

_LOOKS_LIKE_A_PATH: Final = re.compile(r"\S*[/\\]\S*|\S+\.[A-Za-z]\w{0,9}")
"""A word with a separator of folders, or with an ending. Endings of formats count in texts of several words too."""


class UsageError(Exception):
    """The command cannot run as it was given."""


def connect(args: argparse.Namespace) -> Client:
    """Returns a client of the server that the arguments name."""
    with usage():
        return Client(args.target, timeout_s=args.timeout_s)


@contextlib.contextmanager
def usage() -> Iterator[None]:
    """Makes wrong usage of what is wrong with an argument or a LAYERTAP_… variable."""
    try:
        yield
    except InvalidArgumentError as exc:
        raise UsageError(str(exc)) from exc


def fields(args: argparse.Namespace) -> Fields:
    """Returns which fields of a file mean what."""
    default = Fields()
    return Fields(text=args.text_field or default.text, id=args.id_field, keep=getattr(args, "keep", None) or ())


def source(args: argparse.Namespace) -> Source:
    """Returns where the texts come from: the arguments, the file that the only one names, or stdin.

    Raises:
        UsageError: if the arguments are neither texts nor one file.
        JobError: if a Parquet file does not have the columns.
        ModuleNotFoundError: if Parquet needs a package that is missing.
    """
    given: list[str] = args.texts
    if given in ([], ["-"]) and not args.text:
        if sys.stdin is not None and sys.stdin.isatty():
            warn("reading texts from the terminal, one a line; Ctrl-D ends them")
        return reader(args, None)
    paths = _paths(args)
    if not paths:
        _refuse_fields(args, "texts of the command line")
        return Arguments(texts=given)
    if len(given) > 1:
        raise UsageError(
            f"{paths[0]} looks like a file; pass one file, several with -o and a folder, or texts with --text"
        )
    path = Path(paths[0])
    if os.path.isdir(path):
        raise UsageError(f"{path} is a folder; name a file in it, or pass it as a text with --text")
    if not os.path.exists(path):
        raise UsageError(f"there is no file {path}; to pass it as a text, use --text")
    try:
        return reader(args, path)
    except readers.UnknownFormatError as exc:
        raise UsageError(f"{exc}, or pass it as a text with --text") from exc


def reader(args: argparse.Namespace, path: Path | None) -> Source:
    """Returns what reads a file, or stdin if there is none.

    Raises:
        UsageError: if it has not the fields that the arguments name.
        JobError: if it is of no known format, or a Parquet file without the columns.
        ModuleNotFoundError: if Parquet needs a package that is missing.
    """
    kind = args.input_format or ("txt" if path is None else readers.format_of(path))
    if kind == "txt":
        _refuse_fields(args, "lines of text")
    return readers.open_source(path, kind, fields(args))


def shards(args: argparse.Namespace) -> list[Shard] | None:
    """Returns the files that each become a file of their own, in the share of this process; None: all is one file.

    Raises:
        JobError: if there is no file, or the outputs are in each other's way.
        UsageError: if a flag is for several files, and there is one.
    """
    names = _paths(args)
    several = len(names) > 1 or any(os.path.isdir(one) or is_pattern(one) for one in names)
    flags = bool(args.shard or args.output_format)
    is_whole = args.output is None or not names or len(names) < len(args.texts)
    if is_whole or not (several or flags or args.output.is_dir()):
        if flags:
            raise UsageError("--shard and --output-format need files as input, and with -o a folder as output")
        return None
    index, count = args.shard or (0, 1)
    found = assign(find(names), args.output, suffix=args.output_format or OUTPUTS[0])
    return found[index::count]


def share(value: str) -> tuple[int, int]:
    """Reads I/N."""
    index, _, count = value.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError("pass such as 0/8: which share, from 0, of how many")
    return int(index), int(count)


def layers(value: str) -> Literal["all"] | list[int]:
    """Reads `all`, or layer numbers with commas between them."""
    return "all" if value == "all" else numbers(value)


def numbers(value: str) -> list[int]:
    """Reads numbers with commas between them."""
    try:
        return [int(part) for part in value.split(",")]
    except ValueError as exc:
        raise argparse.ArgumentTypeError("pass numbers such as 0,6 or -1,-2; of layers, also all") from exc


def mix(value: str) -> LayerMix:
    """Reads STRATEGY:LAYERS, or STRATEGY:LAYERS:WEIGHTS."""
    strategy, _, rest = value.partition(":")
    numbers, _, weights = rest.partition(":")
    if strategy not in wire.MIX_STRATEGIES or not numbers:
        raise argparse.ArgumentTypeError("pass such as mean:-4,-3,-2,-1 or weighted:0,6:0.5,2")
    try:
        factors = [float(part) for part in weights.split(",")] if weights else None
    except ValueError as exc:
        raise argparse.ArgumentTypeError("weights are numbers with commas, as in weighted:0,6:0.5,2") from exc
    return LayerMix(cast("MixName", strategy), layers=layers(numbers), weights=factors)


def layer_or_mix(value: str) -> int | LayerMix:
    """Reads one layer number, or what `mix` reads."""
    try:
        return int(value)
    except ValueError:
        return mix(value)


def windows(value: str) -> Windows:
    """Reads the stride of windows."""
    try:
        return Windows(stride=int(value))
    except ValueError as exc:
        raise argparse.ArgumentTypeError("pass a number of tokens, such as 128") from exc


def names(value: str) -> tuple[str, ...]:
    """Reads names with commas between them, each once."""
    found = [name for part in value.split(",") if (name := part.strip())]
    if not found or len(set(found)) < len(found) or "ids" in found:
        raise argparse.ArgumentTypeError("pass field names such as title,url, each once; ids is the name of the ids")
    return tuple(found)


def token_ids(value: str) -> list[int]:
    """Reads whole numbers with spaces or commas between them."""
    return [int(part) for part in value.replace(",", " ").split()]


def say(line: str) -> None:
    """Prints a line to stdout, or raises OSError if it is closed."""
    if sys.stdout is None:
        raise OSError("stdout is closed; redirect it to a file")
    print(printable(line))


def say_json(**fields: Any) -> None:
    """Prints one JSON object on a line of its own."""
    say(to_json(fields))


def to_json(fields: dict[str, Any]) -> str:
    """Returns JSON that is ASCII and has nothing that steers a terminal."""
    return json.dumps(fields).replace("\x7f", "\\u007f")


def mention(line: str) -> None:
    """Prints a line to stdout if that is possible, for commands whose exit code or file is the answer."""
    try:
        say(line)
        sys.stdout.flush()
    except OSError:
        drop_stdout()


def reason(error: Exception) -> str:
    """Returns what an error says; that of the system with the file that it is about."""
    if not isinstance(error, OSError):
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)


def warn(message: str) -> None:
    """Prints a line to stderr, if there is one."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):  # Nothing is left to say it with; the exit code says it.
            print(f"layertap: {printable(message)}", file=sys.stderr)


def drop_stdout() -> None:
    """Prints what is still buffered, or lets it vanish, so that the interpreter does not fail on it when it ends."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _paths(args: argparse.Namespace) -> list[str]:
    """Returns the arguments that name files or folders, or look as if they did."""
    return [] if args.text else [text for text in args.texts if args.input_format or _is_path(text)]


def _is_path(text: str) -> bool:
    ending = Path(text.removesuffix(readers.COMPRESSED)).suffix.removeprefix(".")
    # Unlike those of Path, this one takes texts that are too long for a name, or have a NUL.
    return ending in readers.FORMATS or bool(_LOOKS_LIKE_A_PATH.fullmatch(text)) or os.path.exists(text)


def _refuse_fields(args: argparse.Namespace, what: str) -> None:
    for flag in ("--text-field", "--id-field", "--keep"):
        if getattr(args, flag.strip("-").replace("-", "_"), None):
            raise UsageError(
                f"{flag} names a field, and {what} have none; it is for .jsonl, .csv, .tsv and .parquet (for other "
                "endings and stdin say --input-format)"
            )
