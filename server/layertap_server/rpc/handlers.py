"""Services as handlers of a gRPC server, whose calls are admitted by their headers.

Methods take and give bytes: so parsing may leave the event loop. To gRPC each has a stream of requests, whatever its
contract says: so a call is admitted before its request is read.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeAlias

import grpc

from layertap_server.rpc.admission import Admission
from layertap_server.rpc.caller import Caller, Context
from layertap_server.rpc.short_requests import ShortRequests

Handler: TypeAlias = "grpc.GenericRpcHandler[bytes, bytes]"
"""What a gRPC server is given for one service."""
Unlimited: TypeAlias = Callable[[bytes], bytes]
"""A method that is answered at once."""


class Service(Protocol):
    """A service: its methods by name."""

    @property
    def unlimited(self) -> Mapping[str, Unlimited]:
        """Those that a full or stopping server answers too."""

    @property
    def unary(self) -> Mapping[str, Callable[[bytes, Caller], Awaitable[bytes]]]:
        """Those that answer with one message."""

    @property
    def streams(self) -> Mapping[str, Callable[[bytes, Caller], Awaitable[None]]]:
        """Those that answer with any number of messages; they get the first message, and may read others."""


def handler(name: str, service: Service, admission: Admission) -> Handler:
    """Returns what a gRPC server is given to answer the calls of a service; see `Admission.answered`."""
    requests = ShortRequests()
    handlers: dict[str, Any] = {}
    for method, unlimited in service.unlimited.items():
        handlers[method] = requests.bounded(grpc.unary_unary_rpc_method_handler(_unlimited(unlimited)))
    for method, answer in service.unary.items():
        handlers[method] = grpc.stream_unary_rpc_method_handler(admission.answered(method, answer))
    for method, stream in service.streams.items():
        handlers[method] = grpc.stream_stream_rpc_method_handler(admission.answered(method, stream))
    return grpc.method_handlers_generic_handler(name, handlers)


def _unlimited(answer: Unlimited) -> Callable[[bytes, Context], Awaitable[bytes]]:
    async def call(request: bytes, _: Context) -> bytes:
        return answer(request)

    return call
