"""A progress bar for long jobs: how much is done, how fast, and how long the rest will take.

Drawn by tqdm (the extra `progress`) on stderr. Unless the caller requests it, there is none without a terminal, without
tqdm, or in the first seconds, within which most jobs end.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

from layertap import optional_deps

Advance: TypeAlias = Callable[[int], object]
"""Advances the bar by so many."""

_UNASKED_DELAY_S: Final = 2.0
"""How long a job must last before a bar that was not requested is drawn."""


@contextlib.contextmanager
def bar(*, total: int | None, shown: bool | None, done: int = 0) -> Iterator[Advance]:
    """Shows a bar as long as the context lasts.

    Args:
        total: How many texts there are in all; None if unknown, which leaves count and rate.
        shown: Whether to show it. None: only on a terminal, for jobs of more than a few seconds, if tqdm is installed.
        done: How many a resumed job had done before; they do not count for the rate.

    Yields:
        A function that advances the bar.

    Raises:
        ModuleNotFoundError: if `shown` is True and tqdm is not installed.
    """
    try:
        wanted = on_terminal() if shown is None else shown
        tqdm = wanted and optional_deps.load("tqdm.auto", extra="progress", purpose="a progress bar")
    except ModuleNotFoundError:
        if shown:
            raise
        tqdm = None
    if not tqdm:
        yield lambda count: None
        return
    delay_s = 0.0 if shown else _UNASKED_DELAY_S
    with tqdm.tqdm(total=total, initial=done, unit=" texts", delay=delay_s, file=sys.stderr) as drawn:
        yield drawn.update


def on_terminal() -> bool:
    """Returns whether stderr is a terminal."""
    # A process without a console has no stderr at all.
    return sys.stderr is not None and sys.stderr.isatty()
