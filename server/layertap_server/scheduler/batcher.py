"""The only queue: texts of many calls in, batches for free instances out, events back to the calls.

Rules:
- Work-conserving: a free instance takes what is queued at once; no timer, no polling.
- A batch is a prefix of the queue (see `fairness`), up to a budget of tokens and of output bytes. While other
  instances idle, an instance takes only its share; while callers share the server, what takes a short time.
- While a long batch pauses, an instance takes short calls whole; see `worker` for how long.
- Output bytes are reserved before a batch starts and given back when the call has sent them (`Call.release`). A call
  that has too much unsent leaves the order until it releases some, so an instance never waits for a reader.
- A full queue refuses at once, or lets a stream wait; see `fairness` for what is kept for light clients. A call whose
  deadline has passed is dropped when it comes first, before it costs anything; one whose caller has left is removed at
  once (`Call.close`).
- Under the lock, taking a batch costs as much as it takes, whatever waits; only calls that the memory of all outputs
  together has no room for are looked at again for each batch.

Knows neither torch nor gRPC nor protobuf: `encode` is an argument, events leave through each call's `deliver`.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from layertap.errors import DeadlineExceededError, UnavailableError
from layertap_server.scheduler.call import BatchPart, Call, Hooks, WaitingText
from layertap_server.scheduler.events import CallFailed, Event, QueueRoom
from layertap_server.scheduler.fairness import BatchTime, Budget, FairQueue, QueueBudget
from layertap_server.scheduler.instances import Instances
from layertap_server.scheduler.windows import TextEvents
from layertap_server.scheduler.worker import IdleInstances
from layertap_server.types import RETRY_STOPPING_S, Allocator, ApplyModules, Encode, Plan, Text

_SHORT_SHARE: Final = 4
"""A call is short that has at most this part of the tokens of the batch that pauses for it."""
_SHORT_LOOK: Final = 4
"""So many calls of each connection are looked at."""
_STOPPING = "the server is stopping; try another, or again later"
_LOST = "the engine has failed and the server is stopping; try another, or again later"


class Batcher:
    """The queue and its instances.

    Attributes:
        instance_count: How many instances there were at the start.
    """

    def __init__(
        self,
        encodes: Sequence[Encode],
        *,
        max_batch_tokens: int,
        max_batch_bytes: int,
        min_share_tokens: int,
        max_queue_texts: int,
        max_queue_tokens: int,
        max_output_bytes: int,
        max_call_output_bytes: int,
        apply_modules: ApplyModules = lambda pooled: pooled,
        hooks: Hooks | None = None,
    ) -> None:
        """Starts one instance, a thread, for each `encode`.

        Args:
            encodes: What runs a batch; each is called by one instance only.
            max_batch_tokens: The most tokens of a batch; a single longer text is a batch of its own.
            max_batch_bytes: The most output bytes of a batch, likewise.
            min_share_tokens: An instance takes at least so many tokens, even while others idle.
            max_queue_texts: Texts that may wait.
            max_queue_tokens: Tokens that may wait.
            max_output_bytes: Bytes computed or being computed and not yet sent, all calls together.
            max_call_output_bytes: Likewise for one call, but always one text; and bytes of the mixes of one batch.
            apply_modules: Applies the sentence modules of vectors, in any instance.
            hooks: Called for batches and refusals.
        """
        self._apply_modules = apply_modules
        self._max_batch_tokens = max_batch_tokens
        self._max_batch_bytes = max_batch_bytes
        self._min_share_tokens = min_share_tokens
        self._max_call_output_bytes = max_call_output_bytes
        self._hooks = hooks or Hooks()
        self._lock = threading.Lock()
        self._idle = IdleInstances(self._lock, len(encodes))
        self._queue = FairQueue()
        self._batch_time = BatchTime()
        self._under_way: dict[int, tuple[float, int]] = {}
        self._full_calls: dict[Call, None] = {}
        self._calls_without_room: dict[Call, None] = {}
        self._arrivals = itertools.count()
        self._waiting = QueueBudget(max_texts=max_queue_texts, max_tokens=max_queue_tokens, hooks=self._hooks)
        self._output_bytes = Budget(max_output_bytes)
        self._stopping = False
        self.instance_count = len(encodes)
        self._instances = Instances(
            encodes,
            next_batch=self._next_batch,
            short_batch=self._short_batch,
            on_all_lost=self._fail_lost,
            hooks=self._hooks,
        )

    @property
    def live_instance_count(self) -> int:
        """How many instances are not lost."""
        return self._instances.live_count

    @property
    def idle_instance_count(self) -> int:
        """How many instances have no batch."""
        return self._idle.count

    @property
    def waiting_text_count(self) -> int:
        """Texts in the queue."""
        return self._waiting.text_count

    @property
    def waiting_token_count(self) -> int:
        """Their tokens."""
        return self._waiting.token_count

    @property
    def held_bytes(self) -> int:
        """Output bytes that are reserved."""
        return self._output_bytes.used

    def open(
        self,
        plan: Plan,
        *,
        client: str,
        connection: str = "",
        deliver: Callable[[Event], None],
        wake: Callable[[], None] = lambda: None,
        expires_at: float | None = None,
        allocator: Allocator | None = None,
        keeps_rows: bool = True,
    ) -> Call:
        """Returns a new call; whether there is room for it, and a server that goes on, is found as its texts are added.

        Args:
            plan: The outputs of its texts.
            client: Its client; see `fairness`.
            connection: Its connection among those of the client.
            deliver: Called with each event, in the thread of an instance; must not block.
            wake: Called after one or several of them, likewise.
            expires_at: Its deadline, by time.monotonic. None: it has none.
            allocator: Where its rows are written. None: in any buffer.
            keeps_rows: Whether token rows of a text that runs as windows come all at once.
        """
        call = Call(
            self,
            plan,
            client=client,
            connection=connection,
            deliver=deliver,
            wake=wake,
            expires_at=expires_at,
            allocator=allocator,
        )
        if plan.of_windows is not None:
            events = TextEvents(call, deliver, keeps_rows=keeps_rows, apply_modules=self._apply_modules)
            call.deliver = events.deliver
        return call

    def lose_stuck(self, timeout_s: float) -> None:
        """See `Instances.lose_stuck`."""
        self._instances.lose_stuck(timeout_s)

    def stop(self, timeout_s: float) -> bool:
        """Fails waiting calls with UNAVAILABLE and ends the instances after their batches.

        Args:
            timeout_s: How long to wait for them.

        Returns:
            Whether all of them have ended.
        """
        with self._lock:
            self._stopping = True
            self._idle.wake(self.instance_count)
        self._fail_waiting(UnavailableError(_STOPPING, retry_after_s=RETRY_STOPPING_S))
        return self._instances.ended(timeout_s)

    def _fail_lost(self) -> None:
        self._fail_waiting(UnavailableError(_LOST, retry_after_s=RETRY_STOPPING_S))

    def _fail_waiting(self, error: UnavailableError) -> None:
        with self._lock:
            calls = list(dict.fromkeys([*self._queue, *self._full_calls, *self._calls_without_room]))
        for call in calls:
            call.report(CallFailed(error))
            call.close()

    def _check_alive(self) -> None:
        if self._stopping or not self._instances.live_count:
            self._hooks.refused("stopping" if self._stopping else "no_instances")
            raise UnavailableError(_STOPPING if self._stopping else _LOST, retry_after_s=RETRY_STOPPING_S)

    def add(self, call: Call, texts: Sequence[Text], waits: bool) -> bool:
        """See `Call.add`."""
        token_count = sum(text.computed_token_count for text in texts)
        now = time.monotonic_ns()
        with self._lock:
            self._check_alive()
            if waits and not call.closed and not self._waiting.has_room(call.client, len(texts), token_count):
                self._calls_without_room[call] = None
                return False
            self._waiting.check(call.client, len(texts), token_count)
            if call.closed or not texts:
                return True
            self._batch_time.arrived(call.client, call.connection, now / 1e9)
            arrival = next(self._arrivals)
            if not call.waiting:
                call.arrival = arrival
                self._queue.add(call)
            call.waiting.extend(WaitingText(text, now, arrival) for text in texts)
            self._count_waiting(call, len(texts), token_count)
            self._wake()
            return True

    def release(self, call: Call, byte_count: int, run_done: bool) -> None:
        """See `Call.release`."""
        with self._lock:
            if call.closed:
                return
            call.held_run_count -= run_done
            self._hold(call, -byte_count)
            if call in self._full_calls:
                del self._full_calls[call]
                self._queue.add(call)
            self._wake()

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
            calls = self._take_calls_without_room()
        _announce_room(calls)

    def _next_batch(self, instance: int) -> list[BatchPart] | None:
        """Waits for a batch, in the thread of an instance. None: the batcher has stopped."""
        while True:
            expired: list[Call] = []
            with self._lock:
                if last := self._under_way.pop(instance, None):
                    self._batch_time.ran(last[1], time.monotonic() - last[0])
                with self._idle.looking():
                    while not (batch := self._take(expired)) and not expired and not self._stopping:
                        self._idle.sleep(instance)
                if batch:
                    self._under_way[instance] = time.monotonic(), sum(part.token_count for part in batch)
                self._wake()
                calls = self._take_calls_without_room()
            _announce_room(calls)
            for call in expired:
                call.report(
                    CallFailed(DeadlineExceededError("the deadline passed in the queue; raise it, or ask for less"))
                )
            if batch:
                return batch
            if self._stopping:
                return None

    def _short_batch(self, instance: int, running: Sequence[BatchPart]) -> list[BatchPart]:
        """Returns short calls that an instance may run while its batch pauses; empty where there are none."""
        if not self._waiting.text_count:  # Without the lock: most pauses are for nothing.
            return []
        with self._lock:
            if self._stopping or self._idle.count:
                return []
            batch = self._take_short(running)
            if batch and (under_way := self._under_way.get(instance)):
                started_at, token_count = under_way
                self._under_way[instance] = started_at, token_count + sum(part.token_count for part in batch)
            calls = self._take_calls_without_room() if batch else []
        _announce_room(calls)
        return batch

    def _take_short(self, running: Sequence[BatchPart]) -> list[BatchPart]:
        """Removes from the queue calls that are short beside a batch that pauses, each with all of its texts."""
        parts: list[BatchPart] = []
        token_budget = sum(part.token_count for part in running) // _SHORT_SHARE
        byte_budget = self._max_batch_bytes // _SHORT_SHARE
        mix_budget = self._max_call_output_bytes - sum(
            part.token_count * part.call.plan.mix_token_bytes for part in running
        )
        now = time.monotonic()
        for call in list(self._queue.heads(_SHORT_LOOK)):
            token_count = call.waiting_token_count
            if token_count > token_budget or any(part.call is call for part in running):
                continue
            texts = [waiting.text for waiting in call.waiting]
            byte_count = sum(map(call.bytes_of, texts))
            mix_bytes = token_count * call.plan.mix_token_bytes
            if byte_count > byte_budget or mix_bytes > mix_budget or any(text.windows is not None for text in texts):
                continue
            if call.expires_at is not None and call.expires_at <= now:
                continue
            if not self._may_hold(call, byte_count, is_in_batch=False):
                continue
            if byte_count and not self._output_bytes.has_room(call.client, byte_count):
                continue
            token_budget -= token_count
            byte_budget -= byte_count
            mix_budget -= mix_bytes
            parts.append(BatchPart(call, call.next_text, texts, byte_count, call.waiting[0].admitted_at_ns))
            self._queue.remove(call)
            self._queue.rotate(call.client, call.connection)
            self._count_waiting(call, -len(texts), -token_count)
            call.waiting.clear()
            call.next_text += len(texts)
            call.held_run_count += 1
            self._hold(call, byte_count)
        return parts

    def _take(self, expired: list[Call]) -> list[BatchPart]:
        """Removes the next batch from the queue; adds calls whose deadline has passed to `expired`."""
        share = max(-(-self._waiting.token_count // self._idle.count), self._min_share_tokens)
        now = time.monotonic()
        token_budget = min(share, self._batch_time.most_tokens(self._max_batch_tokens, now))
        byte_budget, mix_budget = self._max_batch_bytes, self._max_call_output_bytes
        parts: list[BatchPart] = []
        last: dict[Call, BatchPart] = {}
        passed_over: list[Call] = []
        self._queue.begin_batch()
        while (call := self._queue.first) is not None:
            text, waiting = call.next_part, call.waiting[0]
            byte_count, mix_bytes = call.bytes_of(text), call.plan.mix_token_bytes * text.token_count
            reserved_bytes = byte_count if text.window is None else call.next_window_bytes
            if call.expires_at is not None and call.expires_at <= now:
                self._drop_waiting(call)
                expired.append(call)
                continue
            if not self._may_hold(call, reserved_bytes, is_in_batch=call in last):
                self._queue.remove(call)
                self._full_calls[call] = None
                continue
            if reserved_bytes and not self._output_bytes.has_room(call.client, reserved_bytes):
                self._queue.remove(call)
                passed_over.append(call)
                continue
            if parts and (text.token_count > token_budget or byte_count > byte_budget or mix_bytes > mix_budget):
                break
            token_budget -= text.token_count
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
            self._count_waiting(call, -(call.next_window == 0), -text.token_count)
            if text.window is None and self._queue.is_alone:
                token_count, byte_count = self._take_more(part, token_budget, byte_budget, mix_budget)
                token_budget -= token_count
                byte_budget -= byte_count
                mix_budget -= call.plan.mix_token_bytes * token_count
            if not call.waiting:
                self._queue.remove(call)
            elif call.waiting[0].arrival != call.arrival:  # What a stream has sent since then comes after other calls.
                self._queue.remove(call)
                call.arrival = call.waiting[0].arrival
                self._queue.add(call)
            self._queue.rotate(call.client, call.connection)
        for call in reversed(passed_over):
            self._queue.put_back(call)
        return parts

    def _take_more(self, part: BatchPart, token_budget: int, byte_budget: int, mix_budget: int) -> tuple[int, int]:
        """Adds the next texts of a call that alternates with no other, as far as it is plain that they may be added.

        It is what `_take` would do with each by itself, in a third of the time.

        Args:
            part: The call's part of the batch.
            token_budget: The tokens that the batch has room for.
            byte_budget: Its output bytes.
            mix_budget: Its bytes of mixes.

        Returns:
            The tokens and the output bytes of the texts added.
        """
        call, token_count, byte_count = part.call, 0, 0
        if call.plan.mix_token_bytes:
            token_budget = min(token_budget, mix_budget // call.plan.mix_token_bytes)
        byte_budget = min(byte_budget, self._max_call_output_bytes - call.held_bytes)
        texts: list[Text] = []
        for waiting in call.waiting:
            text = waiting.text
            tokens, size = token_count + len(text.input_ids), byte_count + call.bytes_of(text)
            if text.windows is not None or waiting.arrival != call.arrival:
                break
            if tokens > token_budget or size > byte_budget or not self._output_bytes.has_room(call.client, size):
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

    def _may_hold(self, call: Call, byte_count: int, *, is_in_batch: bool) -> bool:
        """Returns whether a call may have so many more bytes unsent; one text it may always have."""
        if not call.held_bytes:
            return True
        if not is_in_batch and call.held_run_count > self.instance_count:
            return False
        return call.held_bytes + byte_count <= self._max_call_output_bytes

    def _hold(self, call: Call, byte_count: int) -> None:
        """Counts output bytes that a call reserves, or with a negative number gives back."""
        call.held_bytes += byte_count
        self._output_bytes.add(call.client, byte_count)

    def _count_waiting(self, call: Call, text_count: int, token_count: int) -> None:
        """Counts texts that a call queues, or with negative numbers takes out."""
        call.waiting_token_count += token_count
        self._waiting.add(call.client, text_count, token_count)

    def _drop_waiting(self, call: Call) -> None:
        """Removes the waiting texts of a call."""
        if not call.waiting:
            return
        if call in self._full_calls:
            del self._full_calls[call]
        else:
            self._queue.remove(call)
        self._count_waiting(call, -len(call.waiting), -call.waiting_token_count)
        call.waiting.clear()

    def _take_calls_without_room(self) -> list[Call]:
        calls = list(self._calls_without_room)
        self._calls_without_room.clear()
        return calls

    def _wake(self) -> None:
        """Wakes instances for what waits, unless enough are on their way to it."""
        if self._queue:
            self._idle.wake(-(-self._waiting.token_count // self._min_share_tokens))


def _announce_room(calls: Sequence[Call]) -> None:
    """Lets calls that wait for room in the queue try again."""
    for call in calls:
        call.report(QueueRoom())
