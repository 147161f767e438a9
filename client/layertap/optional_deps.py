"""Packages that layertap does not require, imported when first used; a missing one is named with its extra."""

from __future__ import annotations

import importlib
from typing import Any


def load(module: str, *, extra: str, purpose: str) -> Any:
    """Imports a module that an extra of this package brings; `purpose` is what needs it, as the user called it.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as exc:
        package = module.partition(".")[0]
        if exc.name != package:
            raise
        message = f"{purpose} needs {package}; install it with: pip install 'layertap[{extra}]'"
        raise ModuleNotFoundError(message, name=package) from exc
