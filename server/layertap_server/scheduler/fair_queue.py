"""The calls that wait, in the order in which they are served: clients take turns, and so do the connections of each.

A client is whoever the server takes a caller for; see `auth`. One who opens many connections gets no more for it, and
two programs that come as the same client do not hold each other up. Within a connection calls are served as they came.

Pure: changed by the batcher, under its lock, and by nobody else.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from layertap_server.scheduler.call import Call


class Turns:
    """Who comes next."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, OrderedDict[str, deque[Call]]] = OrderedDict()

    def __iter__(self) -> Iterator[Call]:
        """Every call that waits; calls may be removed meanwhile."""
        return iter([call for client in self._clients for call in self.of(client)])

    def __contains__(self, client: str) -> bool:
        """Whether a client has a call that waits."""
        return client in self._clients

    @property
    def clients(self) -> list[str]:
        """The clients, whoever is next first."""
        return list(self._clients)

    def of(self, client: str) -> Iterator[Call]:
        """Yields the calls of a client, the next one first."""
        for calls in self._clients[client].values():
            yield from calls

    def waiting_of(self, client: str) -> tuple[int, int]:
        """Returns how many texts and tokens of a client wait."""
        calls = [call for calls in self._clients.get(client, {}).values() for call in calls]
        return sum(len(call.waiting) for call in calls), sum(call.waiting_token_count for call in calls)

    def add(self, call: Call) -> None:
        """Puts a call at the end of its connection's line."""
        self._clients.setdefault(call.client, OrderedDict()).setdefault(call.connection, deque()).append(call)

    def remove(self, call: Call) -> None:
        """Takes a call out."""
        connections = self._clients[call.client]
        calls = connections[call.connection]
        calls.remove(call)
        if not calls:
            del connections[call.connection]
        if not connections:
            del self._clients[call.client]

    def served(self, call: Call) -> None:
        """Notes that a call has had its turn: its connection and its client now come last."""
        if call.client in self._clients:
            self._clients.move_to_end(call.client)
            if call.connection in self._clients[call.client]:
                self._clients[call.client].move_to_end(call.connection)
