"""What comes back of a call over either channel, before `_protocol` makes results of it."""

from __future__ import annotations

import dataclasses
from typing import Generic

from layertap import wire
from layertap._protocol.requests import ResponseT
from layertap.v1 import embedding_pb2 as pb


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One message of an EmbedLayers answer.

    Attributes:
        message: The message without its payload.
        data: The payload.
        view: Access to the rows of the message that lie in shared memory.
    """

    message: pb.EmbedLayersResponse
    data: memoryview
    view: wire.View | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reply(Generic[ResponseT]):
    """One unary answer, and the name of its call in the server's log."""

    message: ResponseT
    request_id: str | None
