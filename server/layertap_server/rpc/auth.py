"""Authentication by bearer tokens.

Rules:
- Where the server has tokens, a call without one is refused before its request is read; health alone stays open.
- The file of tokens has one `name token` or `name:token` on a line, `#` for remarks. A name may have several tokens, so
  that a new one can be handed out before the old one goes.
- Only digests are kept, under a random key of each reading: how long looking one up takes says nothing of a token. No
  message has a token in it.
- A certificate's name is its common name, else the first of its other names that is not empty.
"""

from __future__ import annotations

import contextvars
import hmac
import logging
import os
import re
import stat
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import grpc
import grpc.aio

from layertap.errors import UnauthenticatedError
from layertap_server.rpc.file_reload import ReloadedFiles
from layertap_server.scheduler.call import Hooks

log = logging.getLogger(__name__)

MIN_TOKEN_LENGTH: Final = 16
MAX_TOKEN_LENGTH: Final = 4096
"""gRPC carries 8 KiB of metadata in all."""

_LINE: Final = re.compile(r"(?P<name>[^\s:#]+)(?:\s*:\s*|\s+)(?P<token>[!-~]+)")

_HEALTH: Final = "/grpc.health.v1.Health/"
_SCHEME: Final = "bearer "
_NEVER: Final = (("grpc-retry-pushback-ms", "-1"),)

token_name: contextvars.ContextVar[str | None] = contextvars.ContextVar("token_name", default=None)
"""The name of the token that the call of this context came with. None: the server has no tokens."""


class Tokens:
    """Tokens and the names of their clients."""

    def __init__(self, text: str) -> None:
        """Reads the text of a file.

        Raises:
            ValueError: if a line is at fault; the message has its number and nothing of its content.
        """
        self._key = os.urandom(32)
        self._names: dict[bytes, str] = {}
        for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            found = _LINE.fullmatch(line)
            if found is None or not found["name"].isprintable():
                raise ValueError(f"line {number} is neither `name token` nor `name:token`; correct it")
            if not MIN_TOKEN_LENGTH <= len(found["token"]) <= MAX_TOKEN_LENGTH:
                raise ValueError(
                    f"line {number} has a token of fewer than {MIN_TOKEN_LENGTH} or more than {MAX_TOKEN_LENGTH} "
                    "characters; make one with: openssl rand -hex 32"
                )
            if self._names.setdefault(self._digest(found["token"]), found["name"]) != found["name"]:
                raise ValueError(f"line {number} gives a token to a second name; make another one")
        if not self._names:
            raise ValueError("it has no token; add a line `name token`")

    def name_of(self, token: str) -> str | None:
        """Returns the name of the client that has this token. None: it is unknown."""
        return self._names.get(self._digest(token))

    def _digest(self, token: str) -> bytes:
        return hmac.digest(self._key, token.encode("utf-8", "replace"), "sha256")


def read_tokens(path: str) -> Tokens:
    """Reads a file of tokens; warns if users other than its owner and group may read it.

    Raises:
        OSError: if it cannot be read.
        ValueError: if a line is at fault.
    """
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_mode & stat.S_IROTH:
            log.warning("the token file can be read by every user of this host; run chmod o-rwx on it")
        content = file.read()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as exc:  # It has the content of the file, so it is no cause of what is raised.
        number = content.count(b"\n", 0, exc.start) + 1
        raise ValueError(f"line {number} is not UTF-8; save the file as UTF-8") from None
    return Tokens(text)


def authenticate(tokens: Tokens, authorization: object) -> str:
    """Returns the name of the client whose bearer token an authorization carries.

    The authorization is None where the caller has sent none.

    Raises:
        UnauthenticatedError: if it has no valid token.
    """
    if authorization is None:
        raise UnauthenticatedError("this server asks for a token and none was sent; send authorization: Bearer <token>")
    if not isinstance(authorization, str) or not authorization.lower().startswith(_SCHEME):
        raise UnauthenticatedError("the authorization is no bearer token; send authorization: Bearer <token>")
    name = tokens.name_of(authorization[len(_SCHEME) :].strip())
    if name is None:
        raise UnauthenticatedError("the token is not valid here, or no longer; ask the operator of the server for one")
    return name


class AuthInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in grpc-stubs alone
    """Refuses calls without a valid token."""

    def __init__(self, tokens: ReloadedFiles[Tokens], hooks: Hooks) -> None:
        self._tokens = tokens
        self._hooks = hooks

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """Returns the handler of a call: the method itself, or a refusal."""
        if handler_call_details.method.startswith(_HEALTH):
            return await continuation(handler_call_details)
        given = dict(handler_call_details.invocation_metadata).get("authorization")
        try:
            token_name.set(authenticate(self._tokens.get(), given))
        except UnauthenticatedError as exc:
            return self._refusal(exc.details)
        return await continuation(handler_call_details)

    def _refusal(self, details: str) -> Any:
        async def refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            self._hooks.refused("unauthenticated")
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, details, _NEVER)

        # Whatever the method is: as a stream, nothing of the request is read.
        return grpc.stream_stream_rpc_method_handler(refuse)


def certificate_name(certificate: Mapping[str, Any]) -> str | None:
    """Returns the name in a certificate as Python's `ssl` describes it: the common name, else the first other one."""
    subject = [pair for names in certificate.get("subject", ()) for pair in names]
    names = [name for kind, name in subject if kind == "commonName" and name]
    names += [name for _, name in certificate.get("subjectAltName", ()) if name]
    return names[0] if names else None
