"""Whether threads are those of the system, which a stream of a synchronous client runs in."""

from __future__ import annotations

import _thread
import types

from layertap.errors import FailedPreconditionError


def are_patched() -> bool:
    """Returns whether a library such as gevent has replaced the threads of the system."""
    return not isinstance(_thread.start_new_thread, types.BuiltinFunctionType)


def check_threads() -> None:
    """Checks that threads are those of the system, which a stream runs in.

    Raises:
        FailedPreconditionError: if a library such as gevent has replaced them: the stream would wait for ever.
    """
    if are_patched():
        raise FailedPreconditionError(
            "threads are patched, as gevent's monkey.patch_all() does, and a stream needs real ones; patch with "
            "thread=False, or call embed with no more texts than model_info().limits.max_text_count"
        )
