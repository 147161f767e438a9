"""One engine thread: takes batches, runs them, tells their callers; and can be given up.

An instance is lost when its device is, when its thread ends by an error that nobody foresaw, and when it makes no
progress for too long: a thread that hangs in a driver cannot be ended from outside. The callers of its batch are told
at once; should it come back after all, it notices and ends.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from layertap.errors import InternalError, LayertapError, UnavailableError
from layertap_server.scheduler.call import CallFailed, RowsReady, RunDone, Taken
from layertap_server.scheduler.hooks import Observer
from layertap_server.types import DeviceLostError, Encode, Run

log = logging.getLogger(__name__)

RETRY_AFTER_S = 1.0
"""What a caller is told to wait whose server does not work any more, in seconds."""


class Worker:
    """One engine thread.

    Attributes:
        name: What the log calls it.
        lost: Whether it has been given up.
    """

    def __init__(
        self,
        name: str,
        encode: Encode,
        *,
        next_batch: Callable[[], list[Taken] | None],
        on_lost: Callable[[], None],
        observer: Observer,
    ) -> None:
        """Starts the thread.

        Args:
            name: What the log calls it.
            encode: What runs a batch.
            next_batch: Waits for a batch; None: there will be no more.
            on_lost: Is told when the instance is given up, in whichever thread finds out.
            observer: Is told of each batch that has run.
        """
        self.name = name
        self.lost = False
        self._encode = encode
        self._next_batch = next_batch
        self._on_lost = on_lost
        self._observer = observer
        self._lock = threading.Lock()
        self._batch: list[Taken] = []
        self._moved_at: float | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def stuck(self, timeout_s: float) -> bool:
        """Whether it has a batch and has made no progress for so long."""
        moved_at = self._moved_at
        return moved_at is not None and time.monotonic() - moved_at >= timeout_s

    def lose(self, *, stuck_s: float = 0.0) -> bool:
        """Gives the instance up, and answers the callers of its batch; returns whether it did so now.

        Args:
            stuck_s: Only if it has a batch and has made no progress for so long, in seconds; 0: whatever it does.
        """
        with self._lock:
            if self.lost or (stuck_s and not self.stuck(stuck_s)):
                return False
            self.lost = True
            batch = self._batch
        self._on_lost()  # First, so that whoever asks again at once meets no instance that is gone.
        self._fail(batch, UnavailableError("the engine has failed; try again", retry_after_s=RETRY_AFTER_S))
        return True

    def ended(self, timeout_s: float) -> bool:
        """Waits for the thread, but no longer than that; returns whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while (batch := self._next_batch()) is not None:
                with self._lock:
                    self._batch, self._moved_at = batch, time.monotonic()
                self._compute(batch)
                with self._lock:
                    self._batch, self._moved_at = [], None
                    if self.lost:
                        log.warning("%s has come back, but was given up; it ends", self.name)
                        return
        except BaseException:
            log.exception("%s is lost", self.name)
            self.lose()

    def _compute(self, batch: list[Taken]) -> None:
        started_at_ns = time.monotonic_ns()
        runs = [Run(plan=taken.call.plan, texts=taken.texts, first_text=taken.first_text) for taken in batch]
        try:
            for rows in self._encode(runs):
                self._moved_at = time.monotonic()
                taken = batch[rows.run_index]
                if self.lost or all(taken.call.closed for taken in batch):
                    return
                if not taken.call.closed:
                    taken.call.deliver(RowsReady(taken.first_text, taken.texts, rows))
        except DeviceLostError:
            raise
        except Exception:
            log.exception("a batch of %d texts failed", sum(len(taken.texts) for taken in batch))
            self._fail(batch, InternalError("the encoder failed; the server's log has the reason"))
            return
        compute_time_ns = time.monotonic_ns() - started_at_ns
        self._observer.ran(batch, started_at_ns=started_at_ns, compute_time_ns=compute_time_ns)
        for taken in batch:
            if taken.call.closed:
                continue
            taken.call.deliver(
                RunDone(
                    first_text=taken.first_text,
                    texts=taken.texts,
                    started_at_ns=started_at_ns,
                    queue_time_ns=started_at_ns - taken.admitted_at_ns,
                    compute_time_ns=compute_time_ns,
                    reserved_bytes=taken.reserved_bytes,
                )
            )

    @staticmethod
    def _fail(batch: list[Taken], error: LayertapError) -> None:
        for taken in batch:
            if not taken.call.closed:
                taken.call.deliver(CallFailed(error))
