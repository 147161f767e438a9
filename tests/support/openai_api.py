"""OpenAI's API of a test server, over plain `http.client`, so that what is sent is what is written here."""

from __future__ import annotations

import dataclasses
import http.client
import json
import re
import ssl
from collections.abc import Mapping
from typing import Any

from layertap_server.testing import ServerProcess
from support import Server, poll

WAIT_S = 30.0
_LISTENS = re.compile(r"listens for HTTP (?:process=\d+ )?address=https?://(\S+):(\d+)")


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: Any

    @property
    def error(self) -> dict[str, Any]:
        assert set(self.body) == {"error"} and set(self.body["error"]) == {"message", "type", "param", "code"}
        found: dict[str, Any] = self.body["error"]
        return found


def address_of(server: Server | ServerProcess) -> tuple[str, int]:
    """Returns host and port of a server's HTTP."""

    def log() -> str:
        return server.log if isinstance(server.log, str) else server.log.decode()

    poll(lambda: _LISTENS.search(log()) is not None)
    found = _LISTENS.search(log())
    assert found is not None
    return found[1], int(found[2])


def connect(server: Server, tls: ssl.SSLContext | None = None) -> http.client.HTTPConnection:
    host, port = address_of(server)
    if tls is not None:
        return http.client.HTTPSConnection(host, port, timeout=WAIT_S, context=tls)
    return http.client.HTTPConnection(host, port, timeout=WAIT_S)


def ask(
    server: Server,
    request: object = None,
    *,
    method: str = "POST",
    path: str = "/v1/embeddings",
    headers: Mapping[str, str] | None = None,
    tls: ssl.SSLContext | None = None,
) -> Reply:
    """Sends one request on a connection of its own; what is not bytes is sent as JSON."""
    connection = connect(server, tls)
    try:
        body = request if isinstance(request, bytes | None) else json.dumps(request).encode()
        connection.request(method, path, body, dict(headers or {}))
        return reply_of(connection)
    finally:
        connection.close()


def reply_of(connection: http.client.HTTPConnection) -> Reply:
    answer = connection.getresponse()
    body = answer.read()
    return Reply(answer.status, dict(answer.getheaders()), json.loads(body))
