"""The calls that wait: texts come in, batches go out to free instances, within budgets of memory and of time.

Rules:
- Work-conserving: a free instance takes what is queued at once; no timer, no polling.
- A batch is a prefix of the queue (see `fairness`), up to a budget of tokens and of output bytes. While other
  instances idle, an instance takes only its share; while callers share the server, what takes a short time.
- Output bytes are reserved before a batch starts and given back when the call has sent them (`Call.release`). A call
  that has too much unsent leaves the order until it releases some, so an instance never waits for a reader.
- A full queue refuses at once, or lets a stream wait; see `fairness` for what is kept for light clients. A call whose
  deadline has passed is dropped when it comes first; one whose caller has left is removed at once (`Call.close`).
- Under the lock, taking a batch costs as much as it takes, whatever waits; only calls that the memory of all outputs
  together has no room for are looked at again for each batch.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence

from layertap.errors import DeadlineExceededError, UnavailableError
from layertap_server.scheduler.call import BatchPart, Call, Hooks, WaitingText
from layertap_server.scheduler.events import CallFailed, QueueRoom
from layertap_server.scheduler.fairness import BatchTime, Budget, FairQueue, QueueBudget
from layertap_server.scheduler.queue_limits import QueueLimits
from layertap_server.scheduler.short_calls import LOOK, short_calls
from layertap_server.scheduler.worker import IdleInstances
from layertap_server.types import RETRY_STOPPING_S, ApplyModules, Text

_LATE = "the deadline passed in the queue; raise it, or ask for less"


class CallQueue:
    """The queue of all instances.

    Attributes:
        waiting: The texts that wait, and their tokens.
        output_bytes: Output bytes that are reserved.
        idle: The instances without a batch.
        apply_modules: Applies the sentence modules of vectors, in any instance.
    """

    def __init__(self, instance_count: int, limits: QueueLimits, hooks: Hooks, apply_modules: ApplyModules) -> None:
        self.apply_modules = apply_modules
        self.waiting = QueueBudget(max_texts=limits.max_queue_texts, max_tokens=limits.max_queue_tokens, hooks=hooks)
        self.output_bytes = Budget(limits.max_output_bytes)
        self._limits = limits
        self._hooks = hooks
        self._instance_count = instance_count
        self._lock = threading.Lock()
        self.idle = IdleInstances(self._lock, instance_count)
        self._order = FairQueue()
        self._batch_time = BatchTime()
        self._started: dict[int, float] = {}
        self._running_tokens: Counter[int] = Counter()
        self._full_calls: dict[Call, None] = {}
        self._calls_without_room: dict[Call, None] = {}
        self._arrivals = itertools.count()
        self._end: tuple[str, str] | None = None

    def end(self, message: str, *, reason: str) -> None:
        """Fails all calls that wait and all that come, for one of `REASONS`; instances get no more batches."""
        with self._lock:
            self._end = message, reason
            self.idle.wake(self._instance_count)
            calls = list(dict.fromkeys([*self._order, *self._full_calls, *self._calls_without_room]))
        self.idle.post()
        for call in calls:
            call.report(CallFailed(UnavailableError(message, retry_after_s=RETRY_STOPPING_S)))
            call.close()

    def add(self, call: Call, texts: Sequence[Text], waits: bool) -> bool:
        """See `Call.add`."""
        token_count = sum([text.computed_token_count for text in texts])
        now = time.monotonic_ns()
        with self._lock:
            if self._end is not None:
                message, reason = self._end
                self._hooks.refused(reason)
                raise UnavailableError(message, retry_after_s=RETRY_STOPPING_S)
            if waits and not call.closed and not self.waiting.has_room(call.client, len(texts), token_count):
                self._calls_without_room[call] = None
                return False
            self.waiting.check(call.client, len(texts), token_count)
            if call.closed or not texts:
                return True
            self._batch_time.arrived(call.client, call.connection, now / 1e9)
            arrival = next(self._arrivals)
            if not call.waiting:
                call.arrival = arrival
                self._order.add(call)
            call.waiting.extend([WaitingText(text, now, arrival) for text in texts])
            self._count_waiting(call, len(texts), token_count)
            self._wake()
        self.idle.post()
        return True

    def release(self, call: Call, byte_count: int, run_done: bool) -> None:
        """See `Call.release`."""
        with self._lock:
            if call.closed:
                return
            call.held_run_count -= run_done
            self._hold(call, -byte_count)
            if call in self._full_calls and self._may_hold(call, call.next_part_bytes):
                del self._full_calls[call]
                self._order.add(call)
            self._wake()
        self.idle.post()

    def close(self, call: Call) -> None:
        """See `Call.close`."""
        with self._lock:
            if call.closed:
                return
            call.closed = True
            self._calls_without_room.pop(call, None)
            self._hold(call, -call.held_bytes)
            self._drop_waiting(call)
            self._wake()
            calls, self._calls_without_room = self._calls_without_room, {}
        self._announce(calls)

    def next_batch(self, instance: int) -> list[BatchPart] | None:
        """Waits for a batch, in the thread of an instance. None: the queue has ended."""
        while True:
            expired: list[Call] = []
            with self._lock:
                if started := self._started.pop(instance, None):
                    self._batch_time.ran(self._running_tokens.pop(instance), time.monotonic() - started)
                with self.idle:
                    while not (batch := self._take(expired)) and not expired and not self._end:
                        self.idle.sleep(instance)
                if batch:
                    self._started[instance] = time.monotonic()
                    self._running_tokens[instance] = sum([part.token_count for part in batch])
                self._wake()
                calls, self._calls_without_room = self._calls_without_room, {}
            self._announce(calls)
            for call in expired:
                call.report(CallFailed(DeadlineExceededError(_LATE)))
            if batch or self._end:
                return batch or None

    def short_batch(self, instance: int, running: Sequence[BatchPart]) -> list[BatchPart]:
        """Returns short calls that an instance may run while its batch pauses; empty where there are none."""
        if not self.waiting.texts.used:  # Without the lock: most pauses are for nothing.
            return []
        with self._lock:
            if self._end or self.idle.count:
                return []
            found = short_calls(
                list(self._order.heads(LOOK)),
                running,
                max_batch_bytes=self._limits.max_batch_bytes,
                max_mix_bytes=self._limits.max_call_output_bytes,
                has_room=lambda call, size: self._may_hold(call, size) and self._has_room(call, size),
            )
            batch = [self._take_whole(call, size) for call, size in found]
            self._running_tokens[instance] += sum(part.token_count for part in batch)
            return batch

    def _take_whole(self, call: Call, byte_count: int) -> BatchPart:
        """Removes a call with all of its texts, none of which runs as windows."""
        texts = [waiting.text for waiting in call.waiting]
        part = BatchPart(call, call.next_text, texts, byte_count, call.waiting[0].admitted_at_ns)
        self._drop_waiting(call)
        self._order.rotate(call.client, call.connection)
        call.next_text += len(texts)
        call.held_run_count += 1
        self._hold(call, byte_count)
        return part

    def _take(self, expired: list[Call]) -> list[BatchPart]:
        """Removes the next batch from the queue; adds calls whose deadline has passed to `expired`."""
        if not self._order.begin_batch():
            return []
        share = max(-(-self.waiting.tokens.used // self.idle.count), self._limits.min_share_tokens)
        now = time.monotonic()
        token_budget = min(share, self._batch_time.most_tokens(self._limits.max_batch_tokens, now))
        byte_budget, mix_budget = self._limits.max_batch_bytes, self._limits.max_call_output_bytes
        parts: list[BatchPart] = []
        last: dict[Call, BatchPart] = {}
        passed_over: list[Call] = []
        while (call := self._order.first) is not None:
            text, waiting = call.next_part, call.waiting[0]
            token_count = len(text.input_ids)
            byte_count, mix_bytes = call.bytes_of(text), call.plan.mix_token_bytes * token_count
            reserved_bytes = byte_count if text.window is None else call.next_part_bytes
            if call.expires_at is not None and call.expires_at <= now:
                self._drop_waiting(call)
                expired.append(call)
                continue
            if not self._may_hold(call, reserved_bytes, is_in_batch=call in last):
                self._order.remove(call)
                self._full_calls[call] = None
                continue
            if not self._has_room(call, reserved_bytes):
                self._order.remove(call)
                passed_over.append(call)
                continue
            if parts and (token_count > token_budget or byte_count > byte_budget or mix_bytes > mix_budget):
                break
            token_budget -= token_count
            byte_budget -= byte_count
            mix_budget -= mix_bytes
            part = last.get(call)
            if part is None or part.texts[0].whole is not text.whole:
                part = last[call] = BatchPart(call, call.next_text, [], 0, waiting.admitted_at_ns)
                parts.append(part)
                call.held_run_count += 1
            part.texts.append(text)
            part.reserved_bytes += reserved_bytes
            self._hold(call, reserved_bytes)
            call.take_part()
            self._count_waiting(call, -(call.next_window == 0), -token_count)
            if text.window is None and call.waiting and self._order.is_alone:
                token_count, byte_count = self._take_more(part, token_budget, byte_budget, mix_budget)
                token_budget -= token_count
                byte_budget -= byte_count
                mix_budget -= call.plan.mix_token_bytes * token_count
            if not call.waiting:
                self._order.remove(call)
            elif call.waiting[0].arrival != call.arrival:  # What a stream has sent since then comes after other calls.
                self._order.remove(call)
                call.arrival = call.waiting[0].arrival
                self._order.add(call)
            self._order.rotate(call.client, call.connection)
        for call in reversed(passed_over):
            self._order.put_back(call)
        return parts

    def _take_more(self, part: BatchPart, token_budget: int, byte_budget: int, mix_budget: int) -> tuple[int, int]:
        """Adds the next texts of a call that alternates with no other, as far as it is plain that they may be added.

        It is what `_take` would do with each by itself, in a third of the time. Returns their tokens and output bytes.
        """
        call, token_count, byte_count = part.call, 0, 0
        if call.plan.mix_token_bytes:
            token_budget = min(token_budget, mix_budget // call.plan.mix_token_bytes)
        byte_budget = min(byte_budget, self._limits.max_call_output_bytes - call.held_bytes)
        texts: list[Text] = []
        for waiting in call.waiting:
            text = waiting.text
            tokens, size = token_count + len(text.input_ids), byte_count + call.bytes_of(text)
            if text.windows is not None or waiting.arrival != call.arrival:
                break
            if tokens > token_budget or size > byte_budget or not self.output_bytes.has_room(call.client, size):
                break
            texts.append(text)
            token_count, byte_count = tokens, size
        for _ in texts:
            call.waiting.popleft()
        call.next_text += len(texts)
        part.texts += texts
        part.reserved_bytes += byte_count
        self._hold(call, byte_count)
        self._count_waiting(call, -len(texts), -token_count)
        return token_count, byte_count

    def _has_room(self, call: Call, byte_count: int) -> bool:
        return not byte_count or self.output_bytes.has_room(call.client, byte_count)

    def _may_hold(self, call: Call, byte_count: int, *, is_in_batch: bool = False) -> bool:
        """Returns whether a call may have so many more bytes unsent; one text it may always have."""
        if not call.held_bytes:
            return True
        has_run = is_in_batch or call.held_run_count <= self._instance_count
        return has_run and call.held_bytes + byte_count <= self._limits.max_call_output_bytes

    def _hold(self, call: Call, byte_count: int) -> None:
        """Counts output bytes that a call reserves, or with a negative number gives back."""
        call.held_bytes += byte_count
        self.output_bytes.add(call.client, byte_count)

    def _count_waiting(self, call: Call, text_count: int, token_count: int) -> None:
        """Counts texts that a call queues, or with negative numbers takes out."""
        call.waiting_token_count += token_count
        self.waiting.add(call.client, text_count, token_count)

    def _drop_waiting(self, call: Call) -> None:
        """Removes the waiting texts of a call."""
        if not call.waiting:
            return
        (self._full_calls.pop if call in self._full_calls else self._order.remove)(call)
        self._count_waiting(call, -len(call.waiting), -call.waiting_token_count)
        call.waiting.clear()

    def _wake(self) -> None:
        """Wakes instances for what waits, unless enough are on their way to it."""
        if self.waiting.tokens.used and self._order:
            self.idle.wake(-(-self.waiting.tokens.used // self._limits.min_share_tokens))

    def _announce(self, calls: Iterable[Call]) -> None:
        """Wakes the chosen instances, and lets calls that wait for room in the queue try again; without the lock."""
        self.idle.post()
        for call in calls:
            call.report(QueueRoom())
