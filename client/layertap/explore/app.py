"""The page's HTTP, as an ASGI application: which requests are answered, with what headers, and by what.

Rules:
- Every address begins with the token. A request without it, or with the name of another host, learns nothing.
- A request that another site makes is refused by its Origin.
- The page may load and ask nothing but this application (Content-Security-Policy), and nothing is kept by the browser.
- An answer whose page has left is given up, with the call to the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import importlib.resources
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from importlib.resources.abc import Traversable
from typing import Any, Final, TypeAlias

from layertap.errors import InvalidArgumentError, LayertapError, StatusCode
from layertap.explore import messages
from layertap.explore.messages import Message
from layertap.explore.requests import Request

Receive: TypeAlias = Callable[[], Awaitable[dict[str, Any]]]
Send: TypeAlias = Callable[[dict[str, Any]], Awaitable[None]]
View: TypeAlias = Callable[[Any, Request], AsyncGenerator[Message, None]]

MAX_BODY_BYTES: Final = 64 << 20
"""The longest request: a file of vectors."""

_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_MESSAGES: Final = "application/octet-stream"
_STATUS: Final = {StatusCode.INVALID_ARGUMENT: 400, StatusCode.RESOURCE_EXHAUSTED: 429, StatusCode.UNAVAILABLE: 503}


class App:
    """Answers the requests of one page."""

    def __init__(self, views: Mapping[str, View], session: Any, *, token: str, port: int) -> None:
        """Reads the files of the page; `views` answer what is below `api/`, each with the session and a request."""
        self._views = views
        self._session = session
        self._token = token
        self._hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}
        self._files = dict(_read("", importlib.resources.files("layertap.explore").joinpath("static")))

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answers one request."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        token, _, path = scope["path"].removeprefix("/").partition("/")
        if headers.get(b"host") not in self._hosts:
            await _say(send, 403, "this host is not the page's; open the address that layertap explore printed")
        elif not hmac.compare_digest(token.encode(), self._token.encode()):
            await _say(send, 404, "the address lacks its token; open the address that layertap explore printed")
        elif not self._is_own(headers):
            await _say(send, 403, "another site has made this request")
        elif path.startswith("api/"):
            await self._answer(path.removeprefix("api/"), scope, headers, receive, send)
        elif scope["method"] not in ("GET", "HEAD"):
            await _say(send, 405, "files are read with GET")
        elif (found := self._files.get(path or "index.html")) is None:
            await _say(send, 404, "there is no such file")
        else:
            await _send(send, 200, *found)

    def _is_own(self, headers: Mapping[bytes, str]) -> bool:
        """Returns whether a request is of the page itself, or typed by the user."""
        origin = headers.get(b"origin")
        return origin is None or origin.removeprefix("http://") in self._hosts

    async def _answer(
        self, name: str, scope: dict[str, Any], headers: Mapping[bytes, str], receive: Receive, send: Send
    ) -> None:
        view = self._views.get(name)
        if view is None:
            await _say(send, 404, "there is no such view")
        elif scope["method"] != "POST" or b"origin" not in headers:
            await _say(send, 405, "views are asked with POST, by the page")
        elif (body := await _read_body(receive)) is None:
            await _say(send, 413, f"the request is over {MAX_BODY_BYTES >> 20} MiB; send less at once")
        else:
            work = asyncio.ensure_future(self._run(view, headers, body, send))
            left = asyncio.ensure_future(_until_left(receive))
            await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
            left.cancel()
            work.cancel()
            await asyncio.gather(work, left, return_exceptions=True)
            if not work.cancelled() and (error := work.exception()) is not None:
                raise error

    async def _run(self, view: View, headers: Mapping[bytes, str], body: bytes, send: Send) -> None:
        """Sends the messages of a view; its error is the last of them."""
        started = False
        try:
            async with contextlib.aclosing(view(self._session, _request(headers, body))) as answer:
                async for message in answer:
                    data = await asyncio.to_thread(message.to_bytes) if message.arrays else message.to_bytes()
                    if not started:
                        await _start(send, 200, _MESSAGES)
                        started = True
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        except LayertapError as exc:
            if not started:
                await _start(send, _STATUS.get(exc.code, 500), _MESSAGES)
            await send({"type": "http.response.body", "body": messages.of_error(exc).to_bytes(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def _request(headers: Mapping[bytes, str], body: bytes) -> Request:
    """Reads what the page asks for: JSON, or a file with its name in a header."""
    if (name := headers.get(b"x-file-name")) is not None:
        return Request({"file_name": name, "file": body})
    try:
        fields = json.loads(body)
    except ValueError as exc:
        raise InvalidArgumentError("the request is not JSON") from exc
    if not isinstance(fields, dict):
        raise InvalidArgumentError("the request is not a JSON object")
    return Request(fields)


def _read(prefix: str, folder: Traversable) -> list[tuple[str, tuple[bytes, str]]]:
    """Returns the files below a folder, each with its path, its bytes and its type."""
    found = []
    for entry in folder.iterdir():
        path = f"{prefix}{entry.name}"
        if entry.is_dir():
            found += _read(f"{path}/", entry)
        elif kind := _TYPES.get(entry.name[entry.name.rfind(".") :]):
            found.append((path, (entry.read_bytes(), kind)))
    return found


async def _read_body(receive: Receive) -> bytes | None:
    """Returns the whole request, or None if it is too long."""
    body = bytearray()
    while True:
        event = await receive()
        body += event.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        if not event.get("more_body"):
            return bytes(body)


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _say(send: Send, status: int, text: str) -> None:
    await _send(send, status, f"{text}\n".encode(), "text/plain; charset=utf-8")


async def _send(send: Send, status: int, body: bytes, kind: str) -> None:
    await _start(send, status, kind, len(body))
    await send({"type": "http.response.body", "body": body})


async def _start(send: Send, status: int, kind: str, length: int | None = None) -> None:
    headers = [*_HEADERS, (b"content-type", kind.encode())]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
