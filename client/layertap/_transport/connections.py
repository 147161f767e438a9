"""How many connections a client has, and which processes of the server they meet. Pure.

A connection meets one of the server's processes, chosen by the system. So a client that wants several connections opens
one after the other, asks each which process it has met, and keeps those that spread it evenly.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final, Generic, TypeVar

from layertap._protocol.requests import SERVICE
from layertap.v1 import embedding_pb2 as pb

BUSY_CALL_COUNT: Final = 4
"""With so many calls under way on each connection a client opens more, if it may."""
INFO_TIMEOUT_S: Final = 10.0
"""How long a new connection may take at most to say which process it meets, in seconds."""

_MAX_OWN_COUNT: Final = 16
"""The most connections that a client opens unless it was told how many."""
_TRIES: Final = 8
"""How many connections are tried for each that is wanted; then it is kept whatever it meets."""

ChannelT = TypeVar("ChannelT")
LeaseT = TypeVar("LeaseT")


class UnaryMethods(dict[str, Any]):
    """The unary RPCs of a channel by their names: callables that gRPC makes, each once."""

    def __init__(self, channel: Any) -> None:
        super().__init__()
        self._channel = channel

    def __missing__(self, rpc: str) -> Any:
        self[rpc] = method = self._channel.unary_unary(SERVICE + rpc, None, None)
        return method


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class Opened(Generic[ChannelT, LeaseT]):
    """One connection.

    Attributes:
        channel: Its channel.
        unary: The unary RPCs over it.
        lease: The memory shared over it.
        call_count: Calls under way.
    """

    channel: ChannelT
    unary: UnaryMethods = dataclasses.field(init=False)
    lease: LeaseT
    call_count: int = 0

    def __post_init__(self) -> None:
        self.unary = UnaryMethods(self.channel)


def least_busy(connections: Sequence[Opened[ChannelT, LeaseT]]) -> Opened[ChannelT, LeaseT]:
    """Returns the connection with the fewest calls."""
    return min(connections, key=lambda one: one.call_count)


class Spread:
    """Which further connections a client opens.

    Attributes:
        decided: Whether it opens no more.
    """

    def __init__(self, wanted: int | None) -> None:
        """Begins with the first connection.

        Args:
            wanted: How many connections there are to be; None: one for each process of the server.
        """
        self.decided = wanted == 1
        self._wanted = wanted
        self._met: Counter[int] = Counter()
        self._tried_count = 0
        self._process_count = 1

    def begin(self, info: pb.GetModelInfoResponse) -> None:
        """Learns from the first connection how many processes there are; no more from a second try."""
        if self._met:
            return
        self._process_count = max(info.process_count, 1)
        self._wanted = self._wanted or min(self._process_count, _MAX_OWN_COUNT)
        self._met[info.process_number] += 1
        self._decide()

    def takes(self, info: pb.GetModelInfoResponse) -> bool:
        """Returns whether to keep a further connection that met this process."""
        assert self._wanted is not None
        self._tried_count += 1
        share = -(-self._wanted // self._process_count)
        if self._met[info.process_number] >= share and self._tried_count < _TRIES * self._wanted:
            return False
        self._met[info.process_number] += 1
        self._decide()
        return True

    def _decide(self) -> None:
        assert self._wanted is not None
        self.decided = self._met.total() >= self._wanted
