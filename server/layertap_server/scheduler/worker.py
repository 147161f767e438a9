"""Instances: engine threads that take batches, run them and report to the calls.

Rules:
- An instance is lost when its device is, when its thread ends by an unforeseen error, and when it makes no progress for
  too long: a thread that hangs in a driver cannot be ended from outside. The calls of its batch fail at once; a thread
  that comes back after all ends.
- Where a long batch may pause, short calls that wait run first, in the same thread: for no longer, all pauses together,
  than the batch itself has run. They fail and end by themselves, and a batch in a pause does not pause.
- No more instances are woken than there is work for: one woken for nothing takes the interpreter from those that
  compute. The first ones are woken first: a server with little to do keeps to one instance, whose caches are warm.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence

from layertap.errors import InternalError, LayertapError, UnavailableError, counted
from layertap_server.scheduler.call import BatchPart, Hooks
from layertap_server.scheduler.events import CallFailed, RowsReady, RunDone
from layertap_server.types import RETRY_STOPPING_S, DeviceLostError, Encode, Run

log = logging.getLogger(__name__)


class IdleInstances:
    """The instances without a batch. Used only with the lock held that it was made with, but for `post`."""

    def __init__(self, lock: threading.Lock, instance_count: int) -> None:
        self._lock = lock
        # Writing lets go of the interpreter, which the instance needs. Other ways to wake it hold on to that, and where
        # the instance then takes the core of the loop, both wait: a sixth of what a short call costs.
        self._pipes = [os.pipe() for _ in range(instance_count)]
        for end in itertools.chain.from_iterable(self._pipes):
            weakref.finalize(self, os.close, end).atexit = False
        self._chosen: list[int] = []
        self._asleep: set[int] = set()
        self._looking = 0

    @property
    def count(self) -> int:
        """How many instances have no batch: those asleep, and those that look for one."""
        return len(self._asleep) + self._looking

    def __enter__(self) -> None:
        """Counts an instance among those that look for a batch, until the end of the context."""
        self._looking += 1

    def __exit__(self, *_: object) -> None:
        self._looking -= 1

    def sleep(self, instance: int) -> None:
        """Waits until an instance that looks for a batch is woken; releases the lock meanwhile."""
        self._looking -= 1
        self._asleep.add(instance)
        self._lock.release()
        try:
            os.read(self._pipes[instance][0], 1)
        finally:
            self._lock.acquire()

    def wake(self, wanted: int) -> None:
        """Chooses instances until so many look for a batch, or none sleeps; `post` then wakes them."""
        for instance in sorted(self._asleep)[: max(wanted - self._looking, 0)]:
            self._asleep.remove(instance)
            self._looking += 1
            self._chosen.append(self._pipes[instance][1])

    def post(self) -> None:
        """Wakes the chosen instances; to be called without the lock, which they need."""
        while self._chosen:
            with contextlib.suppress(IndexError):  # Another thread has posted the last one.
                os.write(self._chosen.pop(), b"\0")


class Worker:
    """One engine thread.

    Attributes:
        name: Its name in the log.
        lost: Whether it has been given up.
    """

    def __init__(
        self,
        name: str,
        encode: Encode,
        *,
        next_batch: Callable[[], list[BatchPart] | None],
        short_batch: Callable[[Sequence[BatchPart]], list[BatchPart]],
        on_lost: Callable[[], None],
        hooks: Hooks,
    ) -> None:
        """Starts the thread.

        Args:
            name: Its name in the log.
            encode: What runs a batch.
            next_batch: Waits for a batch. None: none will come.
            short_batch: Returns what may run while the given batch pauses; empty: nothing.
            on_lost: Called when the instance is given up, in the thread that finds out.
            hooks: Called for each batch that has run.
        """
        self.name = name
        self.lost = False
        self._encode = encode
        self._next_batch = next_batch
        self._short_batch = short_batch
        self._on_lost = on_lost
        self._hooks = hooks
        self._lock = threading.Lock()  # Of what is lost: whether it is, its batch, and since when that has not moved.
        self._batch: list[BatchPart] = []
        self._moved_at: float | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def lose(self, *, stuck_s: float = 0.0) -> bool:
        """Gives the instance up and fails the calls of its batch; returns whether it did so now.

        Args:
            stuck_s: Only if it has a batch and has made no progress for so long, in seconds. 0: in any case.
        """
        with self._lock:
            idle_s = 0.0 if self._moved_at is None else time.monotonic() - self._moved_at
            if self.lost or idle_s < stuck_s:
                return False
            self.lost = True
            batch = self._batch
        self._on_lost()  # First: a caller that retries at once must not meet this instance.
        self._fail(batch, _engine_failed())
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

    def _compute(self, batch: list[BatchPart], *, may_pause: bool = True) -> None:
        started_at_ns = time.monotonic_ns()
        paused_ns = 0
        runs = [
            Run(
                plan=part.call.plan.of(part.texts[0]),
                texts=part.texts,
                first_text=part.first_text,
                allocator=None if part.texts[0].whole else part.call.allocator,
            )
            for part in batch
        ]
        try:
            for rows in self._encode(runs):
                self._moved_at = time.monotonic()
                part = None if rows is None else batch[rows.run_index]
                if self.lost or ((part is None or part.call.closed) and all(one.call.closed for one in batch)):
                    return
                if rows is None or part is None:
                    if may_pause:
                        paused_ns += self._pause(batch, time.monotonic_ns() - started_at_ns - 2 * paused_ns)
                    continue
                if not part.call.closed:
                    part.call.report(RowsReady(part.first_text, part.texts, rows))
        except DeviceLostError:
            raise
        except Exception:
            log.exception("a batch of %s failed", counted(sum(len(part.texts) for part in batch), "text"))
            self._fail(batch, InternalError("the encoder failed; the server's log has the reason"))
            return
        compute_time_ns = time.monotonic_ns() - started_at_ns
        self._hooks.ran(batch, started_at_ns=started_at_ns, compute_time_ns=compute_time_ns - paused_ns)
        self._report_done(batch, started_at_ns, compute_time_ns)

    @staticmethod
    def _report_done(batch: list[BatchPart], started_at_ns: int, compute_time_ns: int) -> None:
        for part in batch:
            if part.call.closed:
                continue
            part.call.deliver(
                RunDone(
                    first_text=part.first_text,
                    texts=part.texts,
                    started_at_ns=started_at_ns,
                    queue_time_ns=started_at_ns - part.admitted_at_ns,
                    compute_time_ns=compute_time_ns,
                    reserved_bytes=part.reserved_bytes,
                )
            )
        for wake in {part.call.wake for part in batch}:  # Once a loop, when all its calls have their events.
            wake()

    def _pause(self, batch: list[BatchPart], most_ns: int) -> int:
        """Runs short calls that wait while a batch pauses; returns how long that took.

        Args:
            batch: The batch.
            most_ns: Nothing is begun after so long.
        """
        started_at_ns = time.monotonic_ns()
        paused_ns = 0
        while paused_ns < most_ns and (short := self._short_batch(batch)):
            with self._lock:
                self._batch = [*batch, *short]
                lost = self.lost
            if lost:
                self._fail(short, _engine_failed())
            else:
                self._compute(short, may_pause=False)
            with self._lock:
                self._batch = batch
            paused_ns = time.monotonic_ns() - started_at_ns
        return paused_ns

    @staticmethod
    def _fail(batch: list[BatchPart], error: LayertapError) -> None:
        for part in batch:
            if not part.call.closed:
                part.call.report(CallFailed(error))


def _engine_failed() -> UnavailableError:
    return UnavailableError("the engine has failed; try again", retry_after_s=RETRY_STOPPING_S)
