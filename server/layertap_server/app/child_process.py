"""Work in a forked child, so that what it starts (threads, a device) is not in this process, which others fork from."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class ChildError(Exception):
    """The child ended before it had a result; the message has its exit code."""


def in_child(work: Callable[[], T]) -> T:
    """Returns what some work returns in a child of this process; it and its exceptions must be picklable.

    Raises:
        ChildError: if the child ended before it had a result.
        Exception: if the work raises it.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        _answer(work, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not data:
        raise ChildError(f"a child process ended with exit code {code} before it had a result")
    result, error = pickle.loads(data)
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]  # what the child returned


def _answer(work: Callable[[], T], writing: int) -> None:
    try:
        try:
            data = pickle.dumps((work(), None))
        except Exception as exc:
            data = pickle.dumps((None, exc))
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(data)
        sys.stderr.flush()
    finally:
        os._exit(0)
