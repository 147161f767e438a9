"""What the commands share: texts and numbers from the command line, one JSON object a line, and wrong usage."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, cast

from layertap import optional_deps, wire
from layertap.jobs.readers import Arguments, JsonLines, Lines, Source
from layertap.types import LayerMix, MixName

NO_TEXT: Final = "there is no text; pass some as arguments, a file, or lines of stdin"
SOME_ARE_BAD: Final = 3
"""The exit code of what is done but for some items that could not be."""

FORMATS: Final = ("txt", "jsonl", "parquet")
"""What files of texts may be, and how their names end."""

_STDIN: Final = 0


class UsageError(Exception):
    """The command cannot be meant as it stands."""


def source(args: argparse.Namespace) -> Source:
    """Returns where the texts come from: the arguments, the file that the only one names, or stdin.

    Raises:
        UsageError: The arguments are neither texts nor one file.
        ModuleNotFoundError: Parquet needs a package that is missing.
    """
    given: list[str] = args.texts
    if given in ([], ["-"]):
        if args.input_format == "parquet":
            raise UsageError("Parquet cannot be read from a pipe; name the file")
        # A reader of its own: a thread that still waits in sys.stdin would not let the interpreter end.
        return _lines(args, args.input_format or "txt", lambda: open(_STDIN, "rb", closefd=False), False)
    named = [text for text in given if Path(text).suffix.removeprefix(".") in FORMATS]
    if not named and not args.input_format:
        return Arguments(given)
    if len(given) > 1:
        raise UsageError("pass texts, or one file; texts that end like a file can come by stdin")
    path = Path(given[0])
    if not path.exists() or path.is_dir():
        raise UsageError(f"there is no file {path}; a text that ends like a file can come by stdin")
    kind = args.input_format or path.suffix.removeprefix(".")
    if kind != "parquet":
        return _lines(args, kind, lambda: path.open("rb"), path.is_file())
    optional_deps.load("pyarrow", extra="arrow", purpose="Parquet")
    rows = importlib.import_module("layertap.jobs.arrow").ParquetRows
    found: Source = rows(path=path, text_field=args.text_field, id_field=args.id_field)
    return found


def layers(value: str) -> Literal["all"] | list[int]:
    """Reads `all`, or layer numbers apart by commas."""
    try:
        return "all" if value == "all" else [int(part) for part in value.split(",")]
    except ValueError as exc:
        raise argparse.ArgumentTypeError("pass all, or numbers such as 0,6 or =-1,-2") from exc


def mix(value: str) -> LayerMix:
    """Reads STRATEGY:LAYERS, or STRATEGY:LAYERS:WEIGHTS."""
    strategy, _, rest = value.partition(":")
    numbers, _, weights = rest.partition(":")
    if strategy not in wire.MIX_STRATEGIES or not numbers:
        raise argparse.ArgumentTypeError("pass such as mean:-4,-3,-2,-1 or weighted:0,6:0.5,2")
    try:
        factors = [float(part) for part in weights.split(",")] if weights else None
    except ValueError as exc:
        raise argparse.ArgumentTypeError("weights are numbers apart by commas, as in weighted:0,6:0.5,2") from exc
    return LayerMix(cast("MixName", strategy), layers=layers(numbers), weights=factors)


def layer_or_mix(value: str) -> int | LayerMix:
    """Reads one layer number, or what `mix` reads."""
    try:
        return int(value)
    except ValueError:
        return mix(value)


def token_ids(value: str) -> list[int]:
    """Reads whole numbers apart by spaces or commas."""
    return [int(part) for part in value.replace(",", " ").split()]


def print_json(**fields: Any) -> None:
    """Prints one JSON object on a line of its own."""
    print(json.dumps(fields))


def warn(message: str) -> None:
    """Prints a line to stderr."""
    print(f"layertap: {message}", file=sys.stderr)


def _lines(args: argparse.Namespace, kind: str, opened: Callable[[], BinaryIO], repeatable: bool) -> Source:
    if kind == "txt":
        return Lines(opened, repeatable=repeatable)
    return JsonLines(opened, repeatable=repeatable, text_field=args.text_field, id_field=args.id_field)
