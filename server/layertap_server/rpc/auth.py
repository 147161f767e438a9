"""Who may come in, and as whom.

Where the server has tokens, a call without one is refused before its request is read; health alone stays open. Each
call belongs to a client: by the name of its token, else by its certificate's, else by its address. Clients take turns.
"""

from __future__ import annotations

import contextvars
import urllib.parse
from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc
import grpc.aio

from layertap_server.rpc.file_reload import Watched
from layertap_server.rpc.tokens import Tokens
from layertap_server.scheduler.hooks import Observer

_HEALTH: Final = "/grpc.health.v1.Health/"
_SCHEME: Final = "bearer "
_NEVER: Final = (("grpc-retry-pushback-ms", "-1"),)

_token_name: contextvars.ContextVar[str | None] = contextvars.ContextVar("token_name", default=None)


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in grpc-stubs alone
    """Lets in who has a token."""

    def __init__(self, tokens: Watched[Tokens], observer: Observer) -> None:
        """Takes the tokens, and who is told of each call that is not let in."""
        self._tokens = tokens
        self._observer = observer

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """Returns what answers a call: the method itself, or a refusal."""
        if handler_call_details.method.startswith(_HEALTH):
            return await continuation(handler_call_details)
        given = dict(handler_call_details.invocation_metadata).get("authorization")
        if given is None:
            return self._refusal("this server asks for a token and none was sent; send authorization: Bearer <token>")
        if not isinstance(given, str) or not given.lower().startswith(_SCHEME):
            return self._refusal("the authorization is no bearer token; send authorization: Bearer <token>")
        name = self._tokens.get().name_of(given[len(_SCHEME) :].strip())
        if name is None:
            return self._refusal("the token is none of this server's, or no longer; ask its operator for one")
        _token_name.set(name)
        return await continuation(handler_call_details)

    def _refusal(self, details: str) -> Any:
        async def refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            self._observer.refused("unauthenticated")
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, details, _NEVER)

        # Whatever the method is: as a stream, nothing of the request is read.
        return grpc.stream_stream_rpc_method_handler(refuse)


def client_of(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """Returns whose call this is."""
    if (name := _token_name.get()) is not None:
        return name
    for name_bytes in context.auth_context().get("x509_common_name", ()):
        return name_bytes.decode(errors="replace")
    peer = urllib.parse.unquote(context.peer())
    scheme, _, address = peer.partition(":")
    return scheme if scheme.startswith("unix") else address.rpartition(":")[0]


def connection_of(context: grpc.aio.ServicerContext[Any, Any], call: object) -> str:
    """Returns what tells a client's connections apart. Over a unix socket all look the same: there each call is one."""
    peer = context.peer()
    return f"{peer}#{id(call)}" if peer.startswith("unix") else peer
