"""What both clients are before their first call: settings, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

from layertap._shared_memory.mapping import SharedMemory
from layertap._transport.settings import DEFAULT_RETRIES, Connection, Option, resolve, seconds
from layertap._transport.tls import TLS
from layertap.errors import InvalidArgumentError

TransportT = TypeVar("TransportT")


class BaseClient:
    """The settings of a client. Clients with equal settings are equal, and are pickled and copied as their settings."""

    def __init__(
        self,
        target: str | None = None,
        *,
        shared_memory: bool = False,
        tls: TLS | bool | None = None,
        token: str | None = None,
        retries: int = DEFAULT_RETRIES,
        options: Sequence[Option] = (),
        timeout_s: float | None = None,
        fingerprint: str | None = None,
        connections: int | None = None,
    ) -> None:
        """Connects at the first call, not here. What is not given is taken from LAYERTAP_… variables.

        Args:
            target: The server: `host`, `host:port` (50051 without one), `unix:/path`, `dns:///name:port` (all that the
                name resolves to, in rotation), or several `ip:port` with commas between them. None: LAYERTAP_TARGET,
                else 127.0.0.1:50051.
            shared_memory: Whether layers come through memory shared with the server, if it runs on this host as the
                same user and offers that; else they come over the connection, and the log says so. Arrays are then
                views of that memory, which returns to the server when they are collected; a process that forks copies
                first what its children are to read.
            tls: True encrypts and trusts the authorities of this system; a `TLS` names others, and the client's own
                certificate. None: as LAYERTAP_TLS_CA, _CERT and _KEY say, if one is set. False: plaintext, also for a
                token.
            token: The bearer token that each call carries. None: LAYERTAP_TOKEN. Never sent unencrypted to another
                host, unless tls is False, and never unencrypted to a proxy.
            retries: How often, 0 to 4, a call is repeated that the server could not take: as soon as it wishes, and
                not if it says that this is of no use.
            options: Further channel arguments of gRPC, as (name, value).
            timeout_s: The deadline of calls for which none is given, in seconds. None: LAYERTAP_TIMEOUT_S, else 60.
            fingerprint: The only model that may answer, as `ModelInfo.fingerprint`. None: the first that answers.
            connections: How many connections to open at most. Each meets one process of the server, and long streams
                and many calls at once spread over all. None: one for each process.

        Raises:
            InvalidArgumentError: if an argument or variable has no valid value.
        """
        connection = resolve(
            target,
            tls=tls,
            token=token,
            retries=retries,
            options=options,
            timeout_s=timeout_s,
            shared_memory=shared_memory,
            fingerprint=fingerprint,
            connections=connections,
        )
        self.__setstate__(connection)

    @classmethod
    def _from_channel(cls, channel: object, kind: type, timeout_s: float) -> Self:
        if not isinstance(channel, kind):
            given, wanted = (f"{one.__module__}.{one.__name__}" for one in (type(channel), kind))
            raise InvalidArgumentError(f"channel is of type {given}; {cls.__name__} needs a {wanted}")
        client = cls.__new__(cls)
        client.__setstate__(Connection(target="the given channel", timeout_s=seconds("timeout_s", timeout_s)))
        client._given = channel
        return client

    def _made(self, kind: Callable[[Connection, SharedMemory, Any], TransportT]) -> TransportT:
        """Returns the transport that calls go over; of two threads the first one's stays."""
        made: TransportT = self.__dict__.setdefault(
            "_transport", kind(self._connection, self.shared_memory, self._given)
        )
        return made

    @property
    def target(self) -> str:
        """The server, as it was given."""
        return self._connection.target

    @property
    def shared_memory(self) -> SharedMemory:
        """What has come through memory that the server shares."""
        # Of two threads the first one's stays.
        memory: SharedMemory = self.__dict__.setdefault("_memory", SharedMemory(wanted=self._connection.shared_memory))
        return memory

    def __getstate__(self) -> Connection:
        if self._given is not None:
            raise TypeError(f"a {type(self).__name__} made by from_channel cannot be copied; make one from its target")
        return self._connection

    def __setstate__(self, connection: Connection) -> None:
        self.__dict__.clear()
        self._connection = connection
        self._given: Any = None

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._connection == other._connection and self._given is other._given

    def __hash__(self) -> int:
        return hash((type(self).__name__, self._connection, None if self._given is None else id(self._given)))

    def __repr__(self) -> str:
        """Names the server."""
        return f"{type(self).__name__}({self.target!r})"
