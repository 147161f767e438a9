"""The order in which calls are served: round robin between clients, then between the connections of a client.

Rules:
- A client that opens many connections gets no more for it, and two programs that come as one client do not hold each
  other up. What a client is, `rpc.auth` decides.
- Calls of one connection are served first come, first served, by their texts: a stream that always has texts waiting
  does not hold up the calls that come after it.
- Each operation costs the same however many calls wait, but for a binary search among those of one connection.

Pure; the batcher changes it, under its lock.
"""

from __future__ import annotations

import bisect
import operator
from collections import OrderedDict
from collections.abc import Iterator

from layertap_server.scheduler.call import Call

_ARRIVAL = operator.attrgetter("arrival")


class FairQueue:
    """Calls in the order in which they are served."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, OrderedDict[str, list[Call]]] = OrderedDict()

    def __iter__(self) -> Iterator[Call]:
        """Yields every call."""
        for connections in self._clients.values():
            for calls in connections.values():
                yield from calls

    def __bool__(self) -> bool:
        return bool(self._clients)

    @property
    def first(self) -> Call | None:
        """The call that is served next. None: the queue is empty."""
        for connections in self._clients.values():
            for calls in connections.values():
                return calls[0]
        return None

    def add(self, call: Call) -> None:
        """Adds a call to its connection by its arrival; a client or connection that had none comes last."""
        calls = self._clients.setdefault(call.client, OrderedDict()).setdefault(call.connection, [])
        bisect.insort(calls, call, key=_ARRIVAL)

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
            if connection in self._clients[client]:
                self._clients[client].move_to_end(connection)
