"""The only queue: texts of many calls in, batches for free lanes out, answers back to their calls.

Rules:
- Work-conserving: a free lane takes what is queued at once; no timer, no sleep, no polling.
- A batch is a prefix of the queue: round robin between clients, first come first served within one, up to a budget of
  tokens and of output bytes. While other lanes idle, a lane takes only its share.
- Output bytes are reserved before a batch starts and given back when the call has sent them (`Call.release`). A call
  that has too much unsent is passed over, so a lane never waits for a reader.
- A full queue refuses at once. What nobody waits for any more is dropped before it costs anything.

Knows neither torch nor gRPC nor protobuf: `encode` is handed in, events go out through each call's `deliver`.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from layertap.errors import (
    DeadlineExceededError,
    InternalError,
    ResourceExhaustedError,
    UnavailableError,
)
from layertap_server.call import Call, CallFailed, Event, RowsReady, RunDone
from layertap_server.work import Plan, Rows, Run, Text

log = logging.getLogger(__name__)

Encode: TypeAlias = Callable[[Sequence[Run]], Iterator[Rows]]


@dataclasses.dataclass(slots=True)
class _Taken:
    """What one batch takes of one call."""

    call: Call
    first_text: int
    texts: list[Text]
    reserved_bytes: int
    admitted_at_ns: int


class Batcher:
    """The queue and its lanes."""

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
    ) -> None:
        """Starts one lane, a thread, for each `encode`.

        Args:
            encodes: What runs a batch; each is called by one lane only.
            max_batch_tokens: The most tokens of a batch; a single longer text is a batch of its own.
            max_batch_bytes: The most output bytes of a batch, likewise.
            min_share_tokens: A lane takes at least so many tokens, even while others idle.
            max_queue_texts: Texts that may wait.
            max_queue_tokens: Tokens that may wait.
            max_output_bytes: Bytes computed or being computed and not yet sent, all calls together.
            max_call_output_bytes: Likewise for one call, but always one text.
        """
        self._max_batch_tokens = max_batch_tokens
        self._max_batch_bytes = max_batch_bytes
        self._min_share_tokens = min_share_tokens
        self._max_queue_texts = max_queue_texts
        self._max_queue_tokens = max_queue_tokens
        self._max_output_bytes = max_output_bytes
        self._max_call_output_bytes = max_call_output_bytes
        self._changed = threading.Condition()
        self._clients: OrderedDict[str, deque[Call]] = OrderedDict()
        self._waiting_texts = 0
        self._waiting_tokens = 0
        self._held_bytes = 0
        self._idle_lanes = 0
        self._stopping = False
        self._lanes = [
            threading.Thread(target=self._lane, args=(encode,), name=f"lane-{n}", daemon=True)
            for n, encode in enumerate(encodes)
        ]
        for lane in self._lanes:
            lane.start()

    @property
    def lane_count(self) -> int:
        """How many lanes there are."""
        return len(self._lanes)

    @property
    def waiting_text_count(self) -> int:
        """Texts in the queue."""
        return self._waiting_texts

    @property
    def held_bytes(self) -> int:
        """Output bytes that are reserved."""
        return self._held_bytes

    def open(
        self, plan: Plan, *, client: str, deliver: Callable[[Event], None], expires_at: float | None = None
    ) -> Call:
        """Returns a new call.

        Args:
            plan: What is asked of its texts.
            client: Whose it is; clients take turns.
            deliver: Gets its events, in the thread of a lane; must not block.
            expires_at: When nobody waits for it any more, by time.monotonic.

        Raises:
            ResourceExhaustedError: The queue is full.
            UnavailableError: The server is stopping.
        """
        with self._changed:
            self._admit(0, 0)
        return Call(self, plan, client=client, deliver=deliver, expires_at=expires_at)

    def stop(self) -> None:
        """Answers what waits with UNAVAILABLE and ends the lanes after their batches."""
        with self._changed:
            self._stopping = True
            calls = [call for calls in self._clients.values() for call in calls]
            self._changed.notify_all()
        for call in calls:
            call.deliver(CallFailed(UnavailableError("the server is stopping; try another, or again later")))
            call.close()
        for lane in self._lanes:
            lane.join()

    def _admit(self, text_count: int, token_count: int) -> None:
        if self._stopping:
            raise UnavailableError("the server is stopping; try another, or again later", retry_after_s=1.0)
        if self._waiting_texts + text_count > self._max_queue_texts:
            full = f"{self._waiting_texts} texts wait, the queue holds {self._max_queue_texts}"
        elif self._waiting_tokens + token_count > self._max_queue_tokens and self._waiting_texts:
            full = f"{self._waiting_tokens} tokens wait, the queue holds {self._max_queue_tokens}"
        else:
            return
        raise ResourceExhaustedError(f"the server is full: {full}; try again later", retry_after_s=0.5)

    def add(self, call: Call, texts: Sequence[Text], admitted: bool) -> None:
        """See `Call.add`."""
        token_count = sum(text.token_count for text in texts)
        now = time.monotonic_ns()
        with self._changed:
            if not admitted:
                self._admit(len(texts), token_count)
            if call.closed or not texts:
                return
            if not call.waiting:
                self._clients.setdefault(call.client, deque()).append(call)
            call.waiting.extend((text, now) for text in texts)
            call.waiting_token_count += token_count
            self._waiting_texts += len(texts)
            self._waiting_tokens += token_count
            self._changed.notify_all()

    def release(self, call: Call, byte_count: int, run_done: bool) -> None:
        """See `Call.release`."""
        with self._changed:
            if call.closed:
                return
            call.held_bytes -= byte_count
            call.held_run_count -= run_done
            self._held_bytes -= byte_count
            if self._idle_lanes:
                self._changed.notify_all()

    def close(self, call: Call) -> None:
        """See `Call.close`."""
        with self._changed:
            if call.closed:
                return
            call.closed = True
            self._held_bytes -= call.held_bytes
            if call.waiting:
                self._forget(call)
            self._changed.notify_all()

    def _forget(self, call: Call) -> None:
        """Takes a call out of the queue, with all that waits in it."""
        self._waiting_texts -= len(call.waiting)
        self._waiting_tokens -= call.waiting_token_count
        call.waiting.clear()
        call.waiting_token_count = 0
        calls = self._clients[call.client]
        calls.remove(call)
        if not calls:
            del self._clients[call.client]

    def _lane(self, encode: Encode) -> None:
        while True:
            expired: list[Call] = []
            with self._changed:
                self._idle_lanes += 1
                while not (batch := self._take(expired)) and not expired and not self._stopping:
                    self._changed.wait()
                self._idle_lanes -= 1
                if self._stopping and not batch:
                    return
            for call in expired:
                call.deliver(
                    CallFailed(DeadlineExceededError("the deadline passed in the queue; raise it, or ask for less"))
                )
            if batch:
                self._run(encode, batch)

    def _take(self, expired: list[Call]) -> list[_Taken]:
        """Takes the next batch off the queue; calls whose deadline has passed come back in `expired`."""
        now = time.monotonic()
        for calls in list(self._clients.values()):
            for one in list(calls):
                if one.expires_at is not None and one.expires_at <= now:
                    self._forget(one)
                    expired.append(one)
        share = max(-(-self._waiting_tokens // max(self._idle_lanes, 1)), self._min_share_tokens)
        token_budget, byte_budget = min(share, self._max_batch_tokens), self._max_batch_bytes
        batch: dict[Call, _Taken] = {}
        turn = deque(self._clients)
        while turn:
            client = turn.popleft()
            call = next((call for call in self._clients[client] if self._may_take(call, batch)), None)
            if call is None:
                continue
            text, admitted_at_ns = call.waiting[0]
            byte_count = call.bytes_of(text)
            if batch and (text.token_count > token_budget or byte_count > byte_budget):
                break
            token_budget -= text.token_count
            byte_budget -= byte_count
            self._take_one(call, text, byte_count, admitted_at_ns, batch)
            if client in self._clients:
                # Whoever has had a turn comes last, in this batch and the next.
                self._clients.move_to_end(client)
                turn.append(client)
        return list(batch.values())

    def _may_take(self, call: Call, batch: dict[Call, _Taken]) -> bool:
        """Whether the call's next text finds room among the output bytes."""
        byte_count = call.bytes_of(call.waiting[0][0])
        if self._held_bytes + byte_count > self._max_output_bytes:
            return False
        if not call.held_bytes:
            return True
        if call not in batch and call.held_run_count > len(self._lanes):
            return False
        return call.held_bytes + byte_count <= self._max_call_output_bytes

    def _take_one(
        self, call: Call, text: Text, byte_count: int, admitted_at_ns: int, batch: dict[Call, _Taken]
    ) -> None:
        if call not in batch:
            batch[call] = _Taken(call, call.next_text, [], 0, admitted_at_ns)
            call.held_run_count += 1
        taken = batch[call]
        taken.texts.append(text)
        taken.reserved_bytes += byte_count
        call.next_text += 1
        call.held_bytes += byte_count
        self._held_bytes += byte_count
        call.waiting.popleft()
        call.waiting_token_count -= text.token_count
        self._waiting_texts -= 1
        self._waiting_tokens -= text.token_count
        if not call.waiting:
            self._forget(call)

    def _run(self, encode: Encode, batch: list[_Taken]) -> None:
        started_at_ns = time.monotonic_ns()
        try:
            for rows in encode(
                [Run(plan=taken.call.plan, texts=taken.texts, first_text=taken.first_text) for taken in batch]
            ):
                taken = batch[rows.run_index]
                if not taken.call.closed:
                    taken.call.deliver(RowsReady(taken.first_text, taken.texts, rows))
                elif all(taken.call.closed for taken in batch):
                    return
        except Exception:
            log.exception("a batch of %d texts failed", sum(len(taken.texts) for taken in batch))
            error = InternalError("the encoder failed; the server's log has the reason")
            for taken in batch:
                if not taken.call.closed:
                    taken.call.deliver(CallFailed(error))
            return
        compute_time_ns = time.monotonic_ns() - started_at_ns
        for taken in batch:
            if taken.call.closed:
                continue
            taken.call.deliver(
                RunDone(
                    first_text=taken.first_text,
                    texts=taken.texts,
                    queue_time_ns=started_at_ns - taken.admitted_at_ns,
                    compute_time_ns=compute_time_ns,
                    reserved_bytes=taken.reserved_bytes,
                )
            )
