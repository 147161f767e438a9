"""What a setting is: a field with a reason, a unit and bounds, which is read from a flag or a variable.

Which settings there are is said in `config`.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Final


class ConfigError(Exception):
    """A setting has a value that it cannot have; the message is one line that names its flag."""


def setting(
    default: Any,
    reason: str,
    *,
    group: str,
    unit: str = "",
    choices: tuple[str, ...] = (),
    least: float | None = None,
    most: float | None = None,
    shared: bool = False,
) -> Any:
    """Returns a field; one with a unit is, unless stated, at least 1 and at most a day or 1 << 40.

    A shared one is of the whole server: each of several processes gets its part of it.
    """
    if unit and least is None:
        least = 1
    if unit and most is None:
        most = 86_400 if unit == "seconds" else 1 << 40
    metadata = {"reason": reason, "group": group, "unit": unit, "choices": choices, "least": least, "most": most}
    return dataclasses.field(default=default, metadata={**metadata, "shared": shared})


def flag(name: str) -> str:
    """Returns the command line flag of a setting."""
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    """Returns the environment variable of a setting."""
    return "LAYERTAP_" + name.upper()


def fault(field: dataclasses.Field[Any], value: Any) -> str:
    """Returns what is wrong with the value of a setting; "" if nothing is."""
    choices, least, most = (field.metadata[name] for name in ("choices", "least", "most"))
    if choices and value not in choices:
        return f"{flag(field.name)} is {value!r}; choose one of {', '.join(choices)}"
    if least is not None and not least <= value:  # As it is with NaN too.
        return f"{flag(field.name)} is {value}; the least is {least}"
    if most is not None and not value <= most:
        return f"{flag(field.name)} is {value}; the most is {most}"
    return ""


def read(field: dataclasses.Field[Any], text: str) -> Any:
    """Returns the value of a setting from its text.

    Raises:
        ArgumentTypeError: if the text is no such value.
    """
    convert, expected = _KINDS["bytes" if field.metadata["unit"] == "bytes" else type(field.default).__name__]
    try:
        return convert(text)
    except (KeyError, ValueError) as exc:
        raise argparse.ArgumentTypeError(f"must be {expected}") from exc


_BOOLS: Final = {"true": True, "1": True, "false": False, "0": False}
_SIZE: Final = re.compile(r"(\d+) *([KMGT]iB)?")
_UNITS: Final = {None: 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def _bytes(text: str) -> int:
    found = _SIZE.fullmatch(text.strip())
    # Negative numbers are refused by their bounds; for all else `int` raises.
    return int(found[1]) * _UNITS[found[2]] if found else int(text)


_KINDS: Final[Mapping[str, tuple[Callable[[str], Any], str]]] = {
    "bool": (lambda text: _BOOLS[text.lower()], "true or false"),
    "bytes": (_bytes, "a number of bytes, such as 65536 or 64MiB"),
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "str": (str, "a text"),
}
