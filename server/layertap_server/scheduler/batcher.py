"""The only queue: texts of many calls in, batches for free instances out, answers back to their calls.

Rules:
- Work-conserving: a free instance takes what is queued at once; no timer, no polling.
- A batch is a prefix of the queue: in turns between clients (see `fair_queue`), up to a budget of tokens and of output
  bytes. While other instances idle, an instance takes only its share.
- Output bytes are reserved before a batch starts and given back when the call has sent them (`Call.release`). A call
  that has too much unsent is passed over, so an instance never waits for a reader.
- A full queue refuses at once; its last quarter is kept for clients who have less than a quarter of it. What nobody
  waits for any more is dropped before it costs anything.
- An instance that is lost takes its batch with it and nothing else. When the last one is, whoever waits is told.

Knows neither torch nor gRPC nor protobuf: `encode` is handed in, events go out through each call's `deliver`.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from layertap.errors import DeadlineExceededError, ResourceExhaustedError, UnavailableError
from layertap_server.scheduler.bells import Bells
from layertap_server.scheduler.call import Call, CallFailed, Event, Taken
from layertap_server.scheduler.fair_queue import Turns
from layertap_server.scheduler.hooks import Nobody, Observer
from layertap_server.scheduler.oom_retry import in_halves
from layertap_server.scheduler.worker import RETRY_AFTER_S, Worker
from layertap_server.types import Encode, Plan, Text

log = logging.getLogger(__name__)

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
        observer: Observer | None = None,
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
            max_call_output_bytes: Likewise for one call, but always one text.
            observer: Is told of batches and refusals.
        """
        self._max_batch_tokens = max_batch_tokens
        self._max_batch_bytes = max_batch_bytes
        self._min_share_tokens = min_share_tokens
        self._max_queue_texts = max_queue_texts
        self._max_queue_tokens = max_queue_tokens
        self._max_output_bytes = max_output_bytes
        self._max_call_output_bytes = max_call_output_bytes
        self._observer = observer or Nobody()
        self._lock = threading.Lock()
        self._bells = Bells(self._lock, len(encodes))
        self._turns = Turns()
        self._waiting_texts = 0
        self._waiting_tokens = 0
        self._held_bytes = 0
        self._held_of: Counter[str] = Counter()
        self._stopping = False
        self._live_instance_count = self.instance_count = len(encodes)
        self._instances = [
            Worker(
                f"instance-{n}",
                in_halves(encode),
                next_batch=functools.partial(self._next_batch, n),
                on_lost=self._instance_lost,
                observer=self._observer,
            )
            for n, encode in enumerate(encodes)
        ]

    @property
    def live_instance_count(self) -> int:
        """How many instances are not lost."""
        return self._live_instance_count

    @property
    def idle_instance_count(self) -> int:
        """How many instances have no batch."""
        return self._bells.idle_count

    @property
    def waiting_text_count(self) -> int:
        """Texts in the queue."""
        return self._waiting_texts

    @property
    def waiting_token_count(self) -> int:
        """Their tokens."""
        return self._waiting_tokens

    @property
    def held_bytes(self) -> int:
        """Output bytes that are reserved."""
        return self._held_bytes

    def open(
        self,
        plan: Plan,
        *,
        client: str,
        connection: str = "",
        deliver: Callable[[Event], None],
        expires_at: float | None = None,
    ) -> Call:
        """Returns a new call.

        Args:
            plan: What is asked of its texts.
            client: Whose it is; clients take turns.
            connection: Over which of the client's connections it comes; these take turns within the client.
            deliver: Gets its events, in the thread of an instance; must not block.
            expires_at: When nobody waits for it any more, by time.monotonic.

        Raises:
            ResourceExhaustedError: The queue is full.
            UnavailableError: The server is stopping, or its engine has failed.
        """
        with self._lock:
            self._check_alive()
            self._check_room(client, 0, 0)
        return Call(self, plan, client=client, connection=connection, deliver=deliver, expires_at=expires_at)

    def lose_stuck(self, timeout_s: float) -> None:
        """Gives up every instance that has made no progress with its batch for so long."""
        for instance in self._instances:
            if instance.lose(stuck_s=timeout_s):
                log.error("%s has made no progress for %.0f s and is given up", instance.name, timeout_s)

    def stop(self, timeout_s: float) -> bool:
        """Answers what waits with UNAVAILABLE and ends the instances after their batches.

        Args:
            timeout_s: How long to wait for them.

        Returns:
            Whether all of them have ended.
        """
        with self._lock:
            self._stopping = True
            self._bells.wake(self.instance_count)
        self._fail_waiting(UnavailableError(_STOPPING, retry_after_s=RETRY_AFTER_S))
        deadline = time.monotonic() + timeout_s
        return all(
            [
                instance.ended(0.0 if instance.lost else max(deadline - time.monotonic(), 0.0))
                for instance in self._instances
            ]
        )

    def _instance_lost(self) -> None:
        with self._lock:
            self._live_instance_count -= 1
            log.error("an instance is lost, %d of %d are left", self._live_instance_count, self.instance_count)
        if not self._live_instance_count:
            self._fail_waiting(UnavailableError(_LOST, retry_after_s=RETRY_AFTER_S))

    def _fail_waiting(self, error: UnavailableError) -> None:
        with self._lock:
            calls = list(self._turns)
        for call in calls:
            call.deliver(CallFailed(error))
            call.close()

    def _check_alive(self) -> None:
        if self._stopping or not self._live_instance_count:
            self._observer.refused("stopping" if self._stopping else "no_instances")
            raise UnavailableError(_STOPPING if self._stopping else _LOST, retry_after_s=RETRY_AFTER_S)

    def _check_room(self, client: str, text_count: int, token_count: int) -> None:
        own_texts, own_tokens = self._turns.waiting_of(client)
        if self._waiting_texts + text_count > _share(self._max_queue_texts, own_texts, text_count):
            reason, full = "queue_texts", f"{self._waiting_texts} texts wait, the queue holds {self._max_queue_texts}"
        elif self._waiting_texts and self._waiting_tokens + token_count > _share(
            self._max_queue_tokens, own_tokens, token_count
        ):
            reason, full = (
                "queue_tokens",
                f"{self._waiting_tokens} tokens wait, the queue holds {self._max_queue_tokens}",
            )
        else:
            return
        self._observer.refused(reason)
        raise ResourceExhaustedError(f"the server is full: {full}; try again later", retry_after_s=0.5)

    def add(self, call: Call, texts: Sequence[Text], admitted: bool) -> None:
        """See `Call.add`."""
        token_count = sum(text.token_count for text in texts)
        now = time.monotonic_ns()
        with self._lock:
            self._check_alive()
            if not admitted:
                self._check_room(call.client, len(texts), token_count)
            if call.closed or not texts:
                return
            if not call.waiting:
                self._turns.add(call)
            call.waiting.extend((text, now) for text in texts)
            call.waiting_token_count += token_count
            self._waiting_texts += len(texts)
            self._waiting_tokens += token_count
            self._wake()

    def release(self, call: Call, byte_count: int, run_done: bool) -> None:
        """See `Call.release`."""
        with self._lock:
            if call.closed:
                return
            call.held_run_count -= run_done
            self._hold(call, -byte_count)
            self._wake()

    def close(self, call: Call) -> None:
        """See `Call.close`."""
        with self._lock:
            if call.closed:
                return
            call.closed = True
            self._hold(call, -call.held_bytes)
            if call.waiting:
                self._forget(call)
            self._wake()

    def _hold(self, call: Call, byte_count: int) -> None:
        """Counts output bytes of a call that are reserved, or with a negative number given back."""
        call.held_bytes += byte_count
        self._held_bytes += byte_count
        self._held_of[call.client] += byte_count
        if not self._held_of[call.client]:
            del self._held_of[call.client]

    def _forget(self, call: Call) -> None:
        """Takes a call out of the queue, with all that waits in it."""
        self._waiting_texts -= len(call.waiting)
        self._waiting_tokens -= call.waiting_token_count
        call.waiting.clear()
        call.waiting_token_count = 0
        self._turns.remove(call)

    def _wake(self) -> None:
        """Wakes instances for what waits, unless enough are on their way to it."""
        if self._waiting_texts:
            self._bells.wake(-(-self._waiting_tokens // self._min_share_tokens))

    def _next_batch(self, instance: int) -> list[Taken] | None:
        """Waits for a batch, in the thread of an instance; None: the batcher has stopped."""
        while True:
            expired: list[Call] = []
            with self._lock:
                with self._bells.looking():
                    while not (batch := self._take(expired)) and not expired and not self._stopping:
                        self._bells.sleep(instance)
                self._wake()
            for call in expired:
                call.deliver(
                    CallFailed(DeadlineExceededError("the deadline passed in the queue; raise it, or ask for less"))
                )
            if batch:
                return batch
            if self._stopping:
                return None

    def _take(self, expired: list[Call]) -> list[Taken]:
        """Takes the next batch off the queue; calls whose deadline has passed come back in `expired`."""
        now = time.monotonic()
        for one in self._turns:
            if one.expires_at is not None and one.expires_at <= now:
                self._forget(one)
                expired.append(one)
        share = max(-(-self._waiting_tokens // self._bells.idle_count), self._min_share_tokens)
        token_budget, byte_budget = min(share, self._max_batch_tokens), self._max_batch_bytes
        batch: dict[Call, Taken] = {}
        turn = deque(self._turns.clients)
        while turn:
            client = turn.popleft()
            call = next((call for call in self._turns.of(client) if self._may_take(call, batch)), None)
            if call is None:
                continue
            text, admitted_at_ns = call.waiting[0]
            byte_count = call.bytes_of(text)
            if batch and (text.token_count > token_budget or byte_count > byte_budget):
                break
            token_budget -= text.token_count
            byte_budget -= byte_count
            self._take_one(call, text, byte_count, admitted_at_ns, batch)
            # Whoever has had a turn comes last, in this batch and the next.
            self._turns.served(call)
            if client in self._turns:
                turn.append(client)
        return list(batch.values())

    def _may_take(self, call: Call, batch: dict[Call, Taken]) -> bool:
        """Whether the call's next text finds room among the output bytes."""
        byte_count = call.bytes_of(call.waiting[0][0])
        if self._held_bytes + byte_count > _share(self._max_output_bytes, self._held_of[call.client], byte_count):
            return False
        if not call.held_bytes:
            return True
        if call not in batch and call.held_run_count > self.instance_count:
            return False
        return call.held_bytes + byte_count <= self._max_call_output_bytes

    def _take_one(self, call: Call, text: Text, byte_count: int, admitted_at_ns: int, batch: dict[Call, Taken]) -> None:
        if call not in batch:
            batch[call] = Taken(call, call.next_text, [], 0, admitted_at_ns)
            call.held_run_count += 1
        taken = batch[call]
        taken.texts.append(text)
        taken.reserved_bytes += byte_count
        call.next_text += 1
        self._hold(call, byte_count)
        call.waiting.popleft()
        call.waiting_token_count -= text.token_count
        self._waiting_texts -= 1
        self._waiting_tokens -= text.token_count
        if not call.waiting:
            self._forget(call)


def _share(limit: int, own: int, more: int) -> int:
    """Returns how full the queue, or the memory for outputs, may get by a client who has `own` in it and adds `more`.

    Whoever has nothing in it may fill it, so that any request can be admitted.
    """
    return limit if not own or own + more <= limit // 4 else limit - limit // 4
