"""Calls that no admission bounds, such as those of health: only so many of their requests may be on the way at once.

Such a request is some bytes and comes in one piece. One that does not come whole ends when its place is needed: a
caller that sends halves of requests cannot keep others from asking for health, nor take memory by it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Final

import grpc
import grpc.aio

_MAX_COUNT: Final = 16


class ServerOfShortRequests:
    """A server as services see it that are added to it; their requests are short."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server
        self._requests = ShortRequests()

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Does nothing: services add their methods by name too."""

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, Any]) -> None:
        """Adds a service."""
        bounded = {name: self._requests.bounded(one) for name, one in method_handlers.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service_name, bounded),))


class ShortRequests:
    """Short requests that are on their way."""

    def __init__(self) -> None:
        self._under_way: dict[asyncio.Task[Any], asyncio.Event] = {}

    def bounded(self, handler: Any) -> Any:
        """Returns the handler of a method that bounds how many of its requests are on the way."""
        if handler.request_streaming:

            async def converse(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
                with self._place() as ended:
                    try:
                        async for answer in handler.stream_stream(requests, context):
                            yield answer
                    except asyncio.CancelledError:
                        await self._abort(ended, context)

            return grpc.stream_stream_rpc_method_handler(
                converse, handler.request_deserializer, handler.response_serializer
            )
        if handler.response_streaming:

            async def stream(_: Any, context: Any) -> AsyncIterator[Any]:
                async for answer in handler.unary_stream(await self._read(handler, context), context):
                    yield answer

            return grpc.stream_stream_rpc_method_handler(stream, None, handler.response_serializer)

        async def call(_: Any, context: Any) -> Any:
            return await handler.unary_unary(await self._read(handler, context), context)

        return grpc.stream_unary_rpc_method_handler(call, None, handler.response_serializer)

    async def _read(self, handler: Any, context: Any) -> Any:
        """Returns the only message of a request."""
        with self._place() as ended:
            try:
                message = await context.read()
            except asyncio.CancelledError:
                await self._abort(ended, context)
        try:
            if isinstance(message, bytes):
                return message if handler.request_deserializer is None else handler.request_deserializer(message)
        except Exception:  # protobuf's own; it is no message.
            pass
        await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "the request has no message of its kind; send one")

    @contextlib.contextmanager
    def _place(self) -> Iterator[asyncio.Event]:
        """Ends the oldest request that is on its way if there are too many; yields whether this one is ended so."""
        task = asyncio.current_task()
        assert task is not None
        if len(self._under_way) >= _MAX_COUNT:
            oldest, ended = next(iter(self._under_way.items()))
            del self._under_way[oldest]
            ended.set()
            oldest.cancel()
        self._under_way[task] = own = asyncio.Event()
        try:
            yield own
        finally:
            self._under_way.pop(task, None)

    @staticmethod
    async def _abort(ended: asyncio.Event, context: Any) -> None:
        task = asyncio.current_task()
        if not ended.is_set() or task is None:
            raise asyncio.CancelledError
        task.uncancel()
        details = "too many requests of this kind are on their way; send it at once"
        await _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, details)


async def _abort(context: Any, code: grpc.StatusCode, details: str) -> None:
    try:
        await context.abort(code, details)
    except grpc.aio.AbortError:
        raise
    except Exception as exc:  # The call is gone, and gRPC would call that a fault of ours.
        raise asyncio.CancelledError from exc
