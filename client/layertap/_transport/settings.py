"""Where a client connects to and how: what its constructor was told, else what the environment says.

Pure but for the environment, which is read when a client is made, and the files of TLS, which are read when it
connects. Knows no gRPC; `channel` makes channels of this.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

from layertap import wire
from layertap._transport import targets
from layertap._transport.tls import TLS, tls_of
from layertap.errors import InvalidArgumentError

DEFAULT_TARGET: Final = f"127.0.0.1:{targets.DEFAULT_PORT}"
DEFAULT_TIMEOUT_S: Final = 60.0
"""The deadline of calls for which the user names none, in seconds."""
DEFAULT_RETRIES: Final = 3
RECONNECT_S: Final = 0.1
"""How long gRPC waits before it connects anew to a server that it has lost."""

_MAX_RETRIES: Final = 4
"""gRPC makes five attempts at most."""
_RETRY: Final = {
    "initialBackoff": "0.1s",
    "maxBackoff": "1s",
    "backoffMultiplier": 2,
    # CANCELLED by the other side: the call reached a server in the moment in which it stopped, by way of a balancer.
    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"],
}

MAX_CONNECTIONS: Final = 256
Option = tuple[str, str | int]

Metadata: TypeAlias = Mapping[str, str | bytes] | Sequence[tuple[str, str | bytes]]
"""What a call carries beside its request: names in lower case; values of ASCII, or bytes if the name ends in -bin."""

_MAX_TIMEOUT_S: Final = 10 * 366 * 86400.0
"""A later deadline is none; gRPC's own clock would overflow at some."""

_METADATA_NAME: Final = re.compile(r"[0-9a-z_.-]+")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CallSettings:
    """What one call is sent with.

    Attributes:
        timeout_s: Its deadline, in seconds.
        metadata: All that it carries, the token included.
        named_timeout: Whether the caller named the deadline; else it is the client's.
    """

    timeout_s: float
    metadata: tuple[tuple[str, str | bytes], ...] = dataclasses.field(default=(), repr=False)
    named_timeout: bool = False

    def for_stream(self) -> StreamSettings:
        """Returns the settings of a stream that waits as long for each answer, and for a lost server."""
        wait_s = self.timeout_s
        return StreamSettings(item_timeout_s=wait_s, reconnect_timeout_s=wait_s, metadata=self.metadata, raising=True)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StreamSettings:
    """What one stream is sent with.

    Attributes:
        item_timeout_s: How long it waits for an answer, in seconds.
        reconnect_timeout_s: How long it looks for a lost server, in seconds.
        metadata: As in `CallSettings`.
        raising: Whether the error of an item ends the stream; else it is the result of the item.
    """

    item_timeout_s: float
    reconnect_timeout_s: float
    metadata: tuple[tuple[str, str | bytes], ...] = dataclasses.field(default=(), repr=False)
    raising: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """Everything that a client is: what its channel is made of, and what each call needs.

    Attributes:
        target: What the user calls the server.
        tls: How it is encrypted; None: not at all.
        token: The bearer token that each call carries.
        retries: How often a call is repeated that the server could not take.
        options: Further channel arguments of gRPC, as (name, value).
        timeout_s: The deadline of calls for which the user names none, in seconds.
        shared_memory: Whether layers come through memory shared with the server.
        fingerprint: The only model that may answer; None: the first that does.
        plaintext_token: Whether the token may go to another host unencrypted.
        connections: How many connections to the server; None: as many as it has processes, where that pays.
    """

    target: str
    tls: TLS | None = None
    token: str | None = dataclasses.field(default=None, repr=False)
    retries: int = DEFAULT_RETRIES
    options: tuple[Option, ...] = ()
    timeout_s: float = DEFAULT_TIMEOUT_S
    shared_memory: bool = False
    fingerprint: str | None = None
    plaintext_token: bool = False
    connections: int | None = None

    @property
    def uri(self) -> str:
        """The target in gRPC's words."""
        return targets.uri(self.target)

    @property
    def is_local(self) -> bool:
        """Whether what is sent stays on this host."""
        return targets.is_local(self.target)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What each call carries."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def call(self, timeout_s: float | None = None, metadata: Metadata = ()) -> CallSettings:
        """Returns what one call is sent with, from its `timeout_s` and `metadata` arguments.

        Raises:
            InvalidArgumentError: if a deadline is none, or gRPC cannot carry the metadata.
        """
        named = timeout_s is not None
        own = _metadata(metadata) if metadata != () else ()
        if any(name == "authorization" for name, _ in own):
            if self.token:
                raise InvalidArgumentError("metadata has authorization, which the client's token is sent as; pass one")
            dataclasses.replace(self, token="authorization").check_token()
        return CallSettings(
            timeout_s=self.timeout_s if timeout_s is None else seconds("timeout_s", timeout_s),
            metadata=(*self.metadata, *own),
            named_timeout=named,
        )

    def stream(
        self,
        item_timeout_s: float | None,
        reconnect_timeout_s: float | None,
        metadata: Metadata = (),
        *,
        raising: bool = False,
    ) -> StreamSettings:
        """Returns what one stream is sent with, from the arguments of those names.

        Raises:
            InvalidArgumentError: if one is no number of seconds, or gRPC cannot carry the metadata.
        """
        given = {"item_timeout_s": item_timeout_s, "reconnect_timeout_s": reconnect_timeout_s}
        limits = {
            name: self.timeout_s if value is None else seconds(name, value, zero=True) for name, value in given.items()
        }
        return StreamSettings(**limits, metadata=self.call(None, metadata).metadata, raising=raising)

    def proxy_variable(self, environment: Mapping[str, str]) -> str | None:
        """Returns the variable that names the proxy which gRPC takes to the target; None: it takes none."""
        if dict(self.options).get("grpc.enable_http_proxy", 1) == 0:
            return None
        return targets.proxy_variable(self.target, environment)

    def check_token(self) -> None:
        """Checks that a token goes nowhere unencrypted where others could read it.

        Raises:
            InvalidArgumentError: if it would.
        """
        if not self.token or self.tls is not None:
            return
        if not self.is_local and not self.plaintext_token:
            raise InvalidArgumentError(
                f"a token would go to {self.target} unencrypted; pass tls=True or tls=TLS(ca=…), or set "
                "LAYERTAP_TLS_CA; tls=False sends it nevertheless"
            )
        proxy = "grpc.http_proxy" if "grpc.http_proxy" in dict(self.options) else self.proxy_variable(os.environ)
        if proxy is not None:
            raise InvalidArgumentError(
                f"a token would go unencrypted to the proxy that {proxy} names; pass tls=True, or add the host of "
                f"{self.target} to the variable no_proxy"
            )

    @property
    def service_config(self) -> str:
        """How gRPC is to repeat calls and to choose among several servers, in its JSON.

        A server says with its push-back when a call may be repeated, or that it need not be; gRPC obeys.
        """
        config: dict[str, Any] = {}
        if self.retries:
            policy = {"maxAttempts": self.retries + 1, **_RETRY}
            config["methodConfig"] = [{"name": [{"service": wire.SERVICE_NAME}], "retryPolicy": policy}]
        if self.uri.startswith("dns:") or "," in self.uri:
            config["loadBalancingConfig"] = [{"round_robin": {}}]
        return json.dumps(config)


def resolve(
    target: str | None,
    *,
    tls: TLS | bool | None = None,
    token: str | None = None,
    retries: int = DEFAULT_RETRIES,
    options: Sequence[Option] = (),
    timeout_s: float | None = None,
    shared_memory: bool = False,
    fingerprint: str | None = None,
    connections: int | None = None,
) -> Connection:
    """Returns what a client is to use: its arguments, else LAYERTAP_… variables, else defaults.

    Raises:
        InvalidArgumentError: if an argument or variable has no valid value.
    """
    environment = os.environ
    for field, value in (("target", target), ("token", token), ("fingerprint", fingerprint)):
        if not isinstance(value, str | None):
            raise InvalidArgumentError(f"{field} is of type {type(value).__name__}; pass a str")
    if timeout_s is None:
        timeout_s = _seconds(environment.get("LAYERTAP_TIMEOUT_S") or DEFAULT_TIMEOUT_S)
    _check_count("retries", retries, 0, _MAX_RETRIES)
    _check_count("connections", 1 if connections is None else connections, 1, MAX_CONNECTIONS)
    if fingerprint == "":
        raise InvalidArgumentError("fingerprint is no fingerprint; pass the one that model_info() has")
    token = environment.get("LAYERTAP_TOKEN") if token is None else token
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise InvalidArgumentError("token has characters that no token has; pass it without spaces and line ends")
    try:
        pairs = tuple((name, value) for name, value in options)
    except (TypeError, ValueError) as exc:
        raise InvalidArgumentError("options is no list of (name, value); pass gRPC's channel arguments so") from exc
    found = Connection(
        target=target or environment.get("LAYERTAP_TARGET") or DEFAULT_TARGET,
        tls=tls_of(tls, environment),
        token=token or None,
        retries=retries,
        options=pairs,
        timeout_s=seconds("timeout_s", timeout_s),
        shared_memory=shared_memory,
        fingerprint=fingerprint,
        plaintext_token=tls is False,
        connections=connections,
    )
    found.uri  # noqa: B018  # Refuses what is no target.
    found.check_token()
    return found


def seconds(field: str, value: object, *, zero: bool = False) -> float:
    """Returns a number of seconds, no more than a clock can hold.

    Raises:
        InvalidArgumentError: if it is no number above 0, or 0 where `zero` allows it.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (value > 0 or (zero and not value)):
        raise InvalidArgumentError(f"{field} is {value!r}; pass a number of seconds above 0")
    if value > sys.float_info.max:  # Infinity, or an int that is no float.
        raise InvalidArgumentError(f"{field} is too large; pass a number of seconds")
    return min(float(value), _MAX_TIMEOUT_S)


def _check_count(field: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InvalidArgumentError(f"{field} is {value!r}; pass a whole number from {least} to {most}")


def _metadata(metadata: Metadata) -> tuple[tuple[str, str | bytes], ...]:
    try:
        given = metadata.items() if isinstance(metadata, Mapping) else metadata
        pairs: list[tuple[Any, Any]] = [(name, value) for name, value in given]
    except (TypeError, ValueError) as exc:
        raise InvalidArgumentError("metadata is no mapping of names to values, and no list of such pairs") from exc
    for name, value in pairs:
        if not isinstance(name, str) or not _METADATA_NAME.fullmatch(name) or name.startswith("grpc-"):
            raise InvalidArgumentError(
                f"metadata has the name {name!r}; pass lower-case letters, digits and -._, not beginning with grpc-"
            )
        kind = bytes if name.endswith("-bin") else str
        if not isinstance(value, kind) or (isinstance(value, str) and not (value.isascii() and value.isprintable())):
            wanted = "bytes" if kind is bytes else "a str of printable ASCII"
            raise InvalidArgumentError(f"metadata[{name!r}] is of type {type(value).__name__}; it must be {wanted}")
    return tuple(pairs)


def _seconds(value: str | float) -> float:
    try:
        return float(value)
    except ValueError as exc:
        raise InvalidArgumentError("LAYERTAP_TIMEOUT_S is no number of seconds; correct or unset it") from exc
