"""How clients share the server: the order of their calls, what each may use, and how long a batch may be.

Rules:
- Clients are served round robin, then the connections of a client. Of those, what had nothing waiting comes before what
  the last batch has served: a short call waits for the batch that runs, not for the next one of the same caller too.
- A client that opens many connections gets no more for it, and two programs that come as one client do not hold each
  other up. What a client is, `rpc.caller` decides.
- Calls of one connection are served first come, first served, by their texts: a stream that always has texts waiting
  does not hold up the calls that come after it.
- Of each limit the last quarter is kept for clients that use little.
- Each operation costs the same however many calls wait, but for a binary search among those of one connection, and for
  what had nothing waiting a step for each connection that the last batch has served.

Pure. `call_queue` changes the order, under its lock; the admission of calls changes the memory, in its event loop.
"""

from __future__ import annotations

import asyncio
import bisect
import operator
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

from layertap.errors import ResourceExhaustedError
from layertap_server.scheduler.call import Call, Hooks
from layertap_server.types import RETRY_FULL_S

_ARRIVAL = operator.attrgetter("arrival")

TARGET_S: Final = 0.05
"""What a batch should take while callers share the server."""
_SHARED_S: Final = 10.0
"""For so long after callers have alternated, the server counts as shared."""
_LEAST_TOKENS: Final = 64
"""A batch may always have so many: with less, most of the time is not spent on tokens."""
_MEMORY: Final = 0.9
"""How much of what is known of earlier batches counts beside the last one."""
MAX_READS: Final = 4
"""Messages of one client at once. The largest ones take 20 ms of the event loop; short ones come in its next step."""
_FRESH_S: Final = 0.1
"""For so long a message counts that has not come whole."""


class FairQueue:
    """Calls in the order in which they are served."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, OrderedDict[str, list[Call]]] = OrderedDict()
        self._served: dict[tuple[str, str], None] = {}

    def __iter__(self) -> Iterator[Call]:
        """Returns every call."""
        return self.heads(None)

    def __bool__(self) -> bool:
        return bool(self._clients)

    @property
    def first(self) -> Call | None:
        """The call that is served next. None: the queue is empty."""
        for connections in self._clients.values():
            for calls in connections.values():
                return calls[0]
        return None

    @property
    def is_alone(self) -> bool:
        """Whether only one connection has calls here."""
        return len(self._clients) == 1 and len(next(iter(self._clients.values()))) == 1

    def heads(self, count: int | None) -> Iterator[Call]:
        """Yields the first calls, up to so many, of each connection, in the order of clients and connections."""
        for connections in self._clients.values():
            for calls in connections.values():
                yield from calls[:count]

    def add(self, call: Call) -> None:
        """Adds a call to its connection by its arrival; one that had none comes behind those that wait."""
        is_new = call.client not in self._clients
        connections = self._clients.setdefault(call.client, OrderedDict())
        if call.connection not in connections:
            connections[call.connection] = []
            for client, connection in self._served:
                if client == call.client and connection in connections:
                    connections.move_to_end(connection)
                elif is_new and client in self._clients:
                    self._clients.move_to_end(client)
        bisect.insort(connections[call.connection], call, key=_ARRIVAL)

    def put_back(self, call: Call) -> None:
        """Adds a call that was removed without being served; its client and connection come first."""
        self.add(call)
        self._clients.move_to_end(call.client, last=False)
        self._clients[call.client].move_to_end(call.connection, last=False)

    def remove(self, call: Call) -> None:
        """Removes a call."""
        connections = self._clients[call.client]
        calls = connections[call.connection]
        del calls[bisect.bisect_left(calls, call.arrival, key=_ARRIVAL)]
        if not calls:
            del connections[call.connection]
        if not connections:
            del self._clients[call.client]

    def rotate(self, client: str, connection: str) -> None:
        """Moves a client that has been served, and its connection, to the end."""
        if client in self._clients:
            self._clients.move_to_end(client)
            self._served[client, connection] = None
            if connection in self._clients[client]:
                self._clients[client].move_to_end(connection)

    def begin_batch(self) -> bool:
        """Notes that what is served from here on is served in another batch; returns whether there is anything."""
        self._served.clear()
        return bool(self._clients)


class Budget:
    """How much of one limit is used, and by which client.

    The last quarter is kept for clients that use less than a quarter, so that one client cannot use all of it. A client
    that uses nothing may ask for the whole limit: any request that is within the limits can be admitted.

    Attributes:
        limit: The limit.
        used: What all clients use.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._used_by: dict[str, int] = {}

    def used_by(self, client: str) -> int:
        """Returns what one client uses."""
        return self._used_by.get(client, 0)

    def has_room(self, client: str, amount: int) -> bool:
        """Returns whether a client may use so much more."""
        own, quarter = self._used_by.get(client, 0), self.limit // 4
        return self.used + amount <= self.limit - (quarter if own and own + amount > quarter else 0)

    def add(self, client: str, amount: int) -> None:
        """Counts what a client uses, or with a negative amount gives back."""
        self.used += amount
        if own := self._used_by.get(client, 0) + amount:
            self._used_by[client] = own
        else:
            self._used_by.pop(client, None)


class QueueBudget:
    """The texts that wait in the queue, and their tokens.

    Attributes:
        texts: How many texts wait.
        tokens: How many tokens they have.
    """

    def __init__(self, *, max_texts: int, max_tokens: int, hooks: Hooks) -> None:
        self.texts = Budget(max_texts)
        self.tokens = Budget(max_tokens)
        self._hooks = hooks

    def has_room(self, client: str, text_count: int, token_count: int) -> bool:
        """Returns whether a client may queue so much; any one request may be queued where nothing waits."""
        return self.texts.has_room(client, text_count) and (
            not self.texts.used or self.tokens.has_room(client, token_count)
        )

    def check(self, client: str, text_count: int, token_count: int) -> None:
        """Checks that a client may queue so much.

        Raises:
            ResourceExhaustedError: if the queue is full.
        """
        if self.has_room(client, text_count, token_count):
            return
        has_texts = self.texts.has_room(client, text_count)
        what, budget = ("tokens", self.tokens) if has_texts else ("texts", self.texts)
        self._hooks.refused(f"queue_{what}")
        raise ResourceExhaustedError(
            f"the server is full: {budget.used} {what} wait, the queue holds {budget.limit}; try again later",
            retry_after_s=RETRY_FULL_S,
        )

    def add(self, client: str, text_count: int, token_count: int) -> None:
        """Counts texts that a client queues, or with negative numbers takes out."""
        self.texts.add(client, text_count)
        self.tokens.add(client, token_count)


class BatchTime:
    """How many tokens a batch may have, by how long batches take and which callers have come lately.

    A call that comes while all instances compute waits for one of them, and then for its own batch. So while callers
    alternate, a batch has at most the tokens that lately took 50 ms. On the CPU that costs about 3 % of the speed in
    bulk, so a caller that is alone has the whole `--max-batch-tokens`. A text is never cut.
    """

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0
        self._last: tuple[str, str] | None = None
        self._shared_until = 0.0

    def arrived(self, client: str, connection: str, now: float) -> None:
        """Notes that a connection of a client has queued texts, at a time in seconds."""
        last, self._last = self._last, (client, connection)
        if last is not None and last != self._last:
            self._shared_until = now + _SHARED_S

    def ran(self, token_count: int, seconds: float) -> None:
        """Notes how long a batch took."""
        self._tokens = _MEMORY * self._tokens + token_count
        self._seconds = _MEMORY * self._seconds + seconds

    def most_tokens(self, most: int, now: float) -> int:
        """Returns how many tokens the next batch may have, at most so many."""
        if now >= self._shared_until or not self._seconds:
            return most
        return min(most, max(_LEAST_TOKENS, int(TARGET_S * self._tokens / self._seconds)))


class RequestMemory:
    """The memory for the requests of all calls; see `Budget` for what is kept for light clients."""

    def __init__(self, limit: int, hooks: Hooks) -> None:
        self._budget = Budget(limit)
        self._hooks = hooks

    def add(self, client: str, byte_count: int) -> None:
        """Counts bytes of a request.

        Raises:
            ResourceExhaustedError: if the client may not hold so many more.
        """
        if not self._budget.has_room(client, byte_count):
            self._hooks.refused("request_bytes")
            raise ResourceExhaustedError(
                f"the server is full: the requests under way take {self._budget.used} bytes, the most is "
                f"{self._budget.limit}; try again later",
                retry_after_s=RETRY_FULL_S,
            )
        self._budget.add(client, byte_count)

    def give_back(self, client: str, byte_count: int) -> None:
        """Gives back all that a call holds."""
        self._budget.add(client, -byte_count)


class Reads:
    """How many messages of one client come in at once.

    gRPC copies a whole message on the event loop when its last byte has come, some milliseconds for 8 MB, and all that
    end at once before it looks at anything else. So only some messages of a client come in at once; the others stay
    with the caller. What has not come whole after a while holds up no other: it may never come.
    """

    def __init__(self) -> None:
        self._started: dict[str, dict[object, float]] = {}
        self._waiting: dict[str, dict[asyncio.Future[None], None]] = {}

    def try_begin(self, client: str, caller: object) -> bool:
        """Returns whether a caller of a client may read its next message at once; if so, `end` must follow."""
        own, now = self._started.setdefault(client, {}), time.monotonic()
        if len(own) >= MAX_READS:
            oldest, started_at = next(iter(own.items()))
            if started_at + _FRESH_S > now:
                return False
            del own[oldest]
        own[caller] = now
        return True

    async def begin(self, client: str, caller: object) -> None:
        """Waits until a caller of a client may read its next message; `end` must follow."""
        while not self.try_begin(client, caller):
            left_s = next(iter(self._started[client].values())) + _FRESH_S - time.monotonic()
            waiting, future = self._waiting.setdefault(client, {}), asyncio.get_running_loop().create_future()
            waiting[future] = None
            try:
                await asyncio.wait((future,), timeout=max(left_s, 0.0))
            finally:
                del waiting[future]
                if not waiting:
                    del self._waiting[client]

    def end(self, client: str, caller: object) -> None:
        """Notes that a message has come, or will not."""
        own = self._started.get(client, {})
        own.pop(caller, None)
        if not own:
            self._started.pop(client, None)
        for future in self._waiting.get(client, ()):
            if not future.done():
                return future.set_result(None)
