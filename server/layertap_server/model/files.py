"""The small files of a model's folder, read within bounds. Whatever is wrong with one is said in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from layertap_server.flags import ConfigError

MAX_BYTES: Final = 64 << 20
"""The most bytes of a JSON file; the configurations of real models have a few thousand."""

_POINTER: Final = b"version https://git-lfs"
_REASON_LENGTH: Final = 200


class CheckpointError(ConfigError):
    """A model cannot be served; the message is one line with the next step."""


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds.

    Raises:
        FileNotFoundError: if it is not there.
        CheckpointError: if it cannot be read, is too large, or is not JSON.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as exc:
        raise CheckpointError(f"{path.name} cannot be read: {exc.strerror or exc}; check the model folder") from exc
    if len(content) > MAX_BYTES:
        raise CheckpointError(f"{path.name} has more than {MAX_BYTES} bytes; fetch the model again")
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path.name} is not valid JSON ({reason_of(exc)}); fetch the model again") from exc


def check_file(path: Path) -> None:
    """Checks that a file is itself: neither the pointer that git-lfs leaves in its place, nor a pipe or a device.

    Raises:
        CheckpointError: if it is something else.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # To open a pipe might wait for ever.
        raise CheckpointError(f"{path.name} is not a regular file; fetch the model again")
    try:
        with path.open("rb") as file:
            begin = file.read(len(_POINTER))
    except OSError:
        return  # Not there, or not readable, which is reported where it is opened.
    if begin == _POINTER:
        raise CheckpointError(
            f"{path.name} is a git-lfs pointer, not the file itself; run `git lfs pull` in the model folder"
        )


def reason_of(exc: BaseException) -> str:
    """Returns the message of an error of a library as one short line."""
    return shortened(str(exc), _REASON_LENGTH) or type(exc).__name__


def shortened(text: str, most: int) -> str:
    """Returns a text of others, such as a model's folder, as one line with at most so many characters of it."""
    line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))
    return line if len(line) <= most else line[:most] + " …"
