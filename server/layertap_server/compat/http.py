"""HTTP in the server's own event loop: requests, their answers, and the sockets that they come by.

Rules:
- uvicorn's protocol is used without its `Server`, which takes the signals of the process for itself, and polls.
- Each part of an answer must be read within the stall timeout. How long the body of a request may take is up to the
  admission of calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import functools
import math
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final

from uvicorn import Config
from uvicorn.server import ServerState

from layertap.errors import DeadlineExceededError
from layertap_server.compat.http_connection import Connection
from layertap_server.rpc.address import addresses

_HANDSHAKE_TIMEOUT_S: Final = 10.0
_CLOSING_S: Final = 1.0
"""How long connections may take to close once they are cut off."""
_MAX_HEADER_BYTES: Final = 16 << 10
_BACKLOG: Final = 1024


class Exchange:
    """One request and its answer.

    Attributes:
        headers: The headers by their names in lower case.
        address: The client's address; one of IPv6 has brackets.
        connection: What tells the connections of a client apart.
        certificate: The client's certificate as Python describes it; empty: it has shown none.
    """

    def __init__(
        self,
        scope: Mapping[str, Any],
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[Any], Awaitable[None]],
        *,
        stall_timeout_s: float,
    ) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[str, str] = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        host, port = scope["client"] or ("unknown", 0)
        self.address = f"[{host}]" if ":" in host else host
        self.connection = f"http:{self.address}:{port}"
        self._transport: Connection = scope["state"]["connection"]
        self.certificate: Mapping[str, Any] = self._transport.certificate
        self.is_answered = False
        self._receive = receive
        self._send = send
        self._stall_timeout_s = stall_timeout_s
        self._is_read = False
        self._closes = "close" in self.headers.get("connection", "").lower() or scope["http_version"] == "1.0"

    async def read(self, count: Callable[[int], None]) -> bytes:
        """Returns the body of the request; `count` is called with each part's size before it is kept, and may raise."""
        parts: list[bytes] = []
        while not self._is_read:
            message = await self._receive()
            if part := message.get("body"):
                count(len(part))
                parts.append(part)
            self._is_read = not message.get("more_body")
        return b"".join(parts)

    async def answer(self, status: int, headers: Mapping[str, str], body: bytes | AsyncIterator[bytes]) -> int:
        """Sends the answer; returns how many bytes its body has.

        Raises:
            DeadlineExceededError: if the caller does not read it in time; its connection is then closed.
        """
        fields = {"date": email.utils.formatdate(usegmt=True), "content-type": "application/json", **headers}
        if isinstance(body, bytes):
            fields["content-length"] = str(len(body))
        if status == 408 or ("expect" in self.headers and not self._is_read):
            fields["connection"] = "close"  # Nothing tells where another request would begin.
        shown = [(name.encode(), value.encode("latin-1")) for name, value in fields.items()]
        self.is_answered = True
        await self._write({"type": "http.response.start", "status": status, "headers": shown})
        size = 0
        async for part in _once(body) if isinstance(body, bytes) else body:
            size += len(part)
            await self._write({"type": "http.response.body", "body": part, "more_body": True})
        if self._closes and status != 408 and "expect" not in self.headers:
            await self._discard()
        # Apart from the last part: it waits until that has left.
        await self._write({"type": "http.response.body", "body": b"", "more_body": False})
        return size

    async def cut(self) -> None:
        """Closes the connection at once, so that a caller does not take a part of an answer for the whole."""
        await self._transport.cut()

    async def _discard(self) -> None:
        """Reads what is still to come of the request, for a time: a connection that is closed before is reset.

        The answer would be lost with it, since many callers read none before they have sent all.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._stall_timeout_s):
                while not self._is_read:
                    self._is_read = not (await self._receive()).get("more_body")

    async def _write(self, message: Mapping[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                await self._send(message)
        except TimeoutError as exc:
            await self.cut()
            raise DeadlineExceededError(
                f"the answer was not read for {self._stall_timeout_s:g} s; read faster, or ask for less"
            ) from exc


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body


class HttpServer:
    """Listens, and passes requests on.

    `handle` answers one request, and raises nothing but CancelledError. Port 0 is any free one, and without a context
    all is plaintext. `stall_timeout_s` is how long a connection may be without a request, or a part of an answer
    unread.
    """

    def __init__(
        self,
        handle: Callable[[Exchange], Awaitable[None]],
        *,
        host: str,
        port: int,
        shares_port: bool,
        context: ssl.SSLContext | None,
        max_connection_count: int,
        stall_timeout_s: float,
    ) -> None:
        self._handle = handle
        self._host, self._port, self._shares_port = host.strip("[]"), port, shares_port
        self._context = context
        self._stall_timeout_s = stall_timeout_s
        self._state = ServerState()
        self._servers: list[asyncio.Server] = []
        config = Config(
            self._app,
            http=Connection,
            ws="none",
            lifespan="off",
            interface="asgi3",
            # Addresses are the connection's own, and requests are logged once, with all others.
            proxy_headers=False,
            access_log=False,
            log_config=None,
            log_level="error",
            timeout_keep_alive=math.ceil(stall_timeout_s),
            h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        )
        self._connect = functools.partial(
            Connection, config, self._state, idle={}, max_count=max_connection_count, idle_timeout_s=stall_timeout_s
        )

    async def start(self) -> str:
        """Listens; returns the URL of the server.

        Raises:
            OSError: if the address cannot be listened on.
        """
        loop = asyncio.get_running_loop()
        sockets = _listening(self._host, self._port, shares_port=self._shares_port)
        for one in sockets:
            server = await loop.create_server(
                self._connect,
                sock=one,
                backlog=_BACKLOG,
                ssl=self._context,
                ssl_handshake_timeout=None if self._context is None else _HANDSHAKE_TIMEOUT_S,
                ssl_shutdown_timeout=None if self._context is None else _CLOSING_S,
            )
            self._servers.append(server)
        shown = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'http' if self._context is None else 'https'}://{shown}:{sockets[0].getsockname()[1]}"

    async def stop(self, grace_s: float | None) -> None:
        """Stops listening, and closes each connection after its request; all of them after `grace_s`. None: at once."""
        for server in self._servers:
            server.close()
        for connection in self._connections:
            connection.shutdown()
        await self._closed(grace_s or 0.0)
        for connection in self._connections:
            connection.transport.abort()
        await self._closed(_CLOSING_S)

    @property
    def _connections(self) -> list[Connection]:
        return [one for one in self._state.connections if isinstance(one, Connection)]

    async def _closed(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                for connection in self._connections:
                    await connection.lost.wait()

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        connection: Connection = scope["state"]["connection"]
        with connection.request():
            try:
                await self._handle(Exchange(scope, receive, send, stall_timeout_s=self._stall_timeout_s))
            except asyncio.CancelledError:  # The caller has left; uvicorn would call that a fault.
                await connection.cut()


def _listening(host: str, port: int, *, shares_port: bool) -> list[socket.socket]:
    """Returns a socket for each address of a host, all on one port."""
    found = addresses(host, port)
    sockets: list[socket.socket] = []
    try:
        for family, address in dict.fromkeys((family, str(where[0])) for family, _, _, _, where in found):
            both = family == socket.AF_INET6 and address == "::" and socket.has_dualstack_ipv6()
            sockets.append(
                socket.create_server((address, port), family=family, reuse_port=shares_port, dualstack_ipv6=both)
            )
            port = sockets[0].getsockname()[1]
    except OSError:
        for one in sockets:
            one.close()
        raise
    return sockets
