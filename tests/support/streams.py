"""A stream over one connection, as one object."""

from __future__ import annotations

from typing import Any

from layertap._protocol.stream_connection import StreamConnection
from layertap._protocol.stream_state import StreamState
from layertap.v1 import embedding_pb2 as pb

_OF_CONNECTION = ("accepted", "feed", "lost", "take")


class OneConnection:
    """A `StreamState` with the methods of its only `StreamConnection`."""

    def __init__(self, options: pb.EmbedOptions, *, state: StreamState | None = None, **settings: Any) -> None:
        self._state = state or StreamState(options, **settings)
        self._connection = StreamConnection(self._state)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection if name in _OF_CONNECTION else self._state, name)
