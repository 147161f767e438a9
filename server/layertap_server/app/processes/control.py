"""What a supervisor and a process of it say to each other: one JSON object a line, each with one key.

The process says `loaded`, `serving` with its addresses, `metrics`, and `error` where it cannot serve. The supervisor
says `serve` once all are loaded, `metrics` at a scrape, and `probe`, which the process repeats. To stop, it sends a
signal; a closed socket means the same.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from typing import Any, Final

_MAX_LINE_BYTES: Final = 1 << 24


class Control:
    """One end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, end: socket.socket) -> Control:
        """Returns one end of a pair of sockets, for the running loop."""
        reader, writer = await asyncio.open_connection(sock=end, limit=_MAX_LINE_BYTES)
        writer.transport.set_write_buffer_limits(0)  # Else `flushed` would not wait for the last 64 KiB.
        return cls(reader, writer)

    def send(self, name: str, value: Any = None) -> None:
        """Sends a message; to an end that has closed, nothing."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps({name: value}).encode() + b"\n")

    async def messages(self) -> AsyncIterator[tuple[str, Any]]:
        """Yields the messages that come, until the other end closes."""
        while True:
            try:
                line = await self._reader.readline()
            except ConnectionError:
                return
            if not line.endswith(b"\n"):
                return
            ((name, value),) = json.loads(line).items()
            yield name, value

    async def flushed(self) -> None:
        """Waits until all is sent."""
        try:
            await self._writer.drain()
        except ConnectionError:
            return

    def close(self) -> None:
        """Closes this end."""
        self._writer.close()
