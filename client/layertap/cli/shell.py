"""What the commands share: texts and numbers from the command line, one JSON object a line, and wrong usage."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any, Final

NO_TEXT: Final = "there is no text; pass some as arguments, or as lines of stdin"


class UsageError(Exception):
    """The command cannot be meant as it stands."""


def texts(args: argparse.Namespace) -> Iterator[str]:
    """Yields the texts of the arguments, or the lines of stdin as they come."""
    return iter(args.texts) if args.texts else (line.removesuffix("\n") for line in sys.stdin)


def layers(value: str) -> str | list[int]:
    """Reads `all`, or layer numbers apart by commas."""
    try:
        return value if value == "all" else [int(part) for part in value.split(",")]
    except ValueError as exc:
        raise argparse.ArgumentTypeError("pass all, or numbers such as 0,6 or =-1,-2") from exc


def token_ids(value: str) -> list[int]:
    """Reads whole numbers apart by spaces or commas."""
    return [int(part) for part in value.replace(",", " ").split()]


def print_json(**fields: Any) -> None:
    """Prints one JSON object on a line of its own."""
    print(json.dumps(fields))
