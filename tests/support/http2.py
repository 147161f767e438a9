"""Calls in bare HTTP/2 frames, for headers that no gRPC library sends, and requests of which the rest never comes."""

from __future__ import annotations

import socket
import ssl
import struct
import time

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 8
_ACK = _END_STREAM = 1
_END_HEADERS = 4
_INITIAL_WINDOW_SIZE = 4
_MAX_FRAME_BYTES = 1 << 14


def call(
    address: str, method: str, metadata: dict[str, bytes], *, ca: bytes | None = None, wait_s: float = 30
) -> bytes:
    """Sends an empty message to a method; returns what the server sends until the call ends."""
    host, _, port = address.rpartition(":")
    block = _header_block(method, metadata)
    with socket.create_connection((host, int(port)), timeout=wait_s) as connection:
        if ca is not None:
            context = ssl.create_default_context(cadata=ca.decode())
            context.set_alpn_protocols(["h2"])
            connection = context.wrap_socket(connection, server_hostname=host)
        with connection:
            connection.sendall(
                _PREFACE
                + _frame(_SETTINGS, 0, 0)
                + _frame(_HEADERS, _END_HEADERS, 1, block)
                + _frame(_DATA, _END_STREAM, 1, b"\0" * 5)
            )
            received = b""
            while b"grpc-status" not in received and (chunk := connection.recv(1 << 16)):
                received += chunk
            return received


class Connection:
    """A connection whose calls send parts of a message as fast as the server lets them.

    Attributes:
        initial_window: What the server lets each call send before it reads.
        closed: Whether the server has closed it.
        ended: The calls that the server has ended, each with what its headers and trailers were.
    """

    def __init__(self, address: str, *, host: str | None = None) -> None:
        """Connects.

        Args:
            address: The server's.
            host: The address that the connection comes from. None: any.
        """
        to, _, port = address.rpartition(":")
        source = (host, 0) if host else None
        self._socket = socket.create_connection((to, int(port)), timeout=30, source_address=source)
        self._socket.sendall(_PREFACE + _frame(_SETTINGS, 0, 0))
        self._window = self.initial_window = 65_535
        self._windows: dict[int, int] = {}
        self._unsent: dict[int, memoryview] = {}
        self._received = b""
        self.closed = False
        self.ended: dict[int, bytes] = {}
        self._heads: dict[int, bytes] = {}

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    @property
    def sent_all(self) -> bool:
        """Whether all that the calls have to send is sent, or not wanted any more."""
        return not any(self._unsent.values())

    @property
    def open_count(self) -> int:
        """How many calls the server has not ended."""
        return len(self._windows) - len(self.ended)

    def open(self, method: str, *messages: bytes, byte_count: int | None = None, compressed: bool = False) -> int:
        """Begins a call; returns its number.

        Args:
            method: The method.
            messages: What it sends; of the last one perhaps a part.
            byte_count: How long the last message says that it is. None: as long as it is.
            compressed: Whether the messages are compressed with gzip.
        """
        stream = 1 + 2 * len(self._windows)
        self._windows[stream] = self.initial_window
        metadata = {"grpc-encoding": b"gzip"} if compressed else {}
        self._socket.sendall(_frame(_HEADERS, _END_HEADERS, stream, _header_block(method, metadata)))
        lengths = [len(message) for message in messages]
        if byte_count is not None:
            lengths[-1] = byte_count
        parts = (
            bytes([compressed]) + struct.pack(">I", length) + message
            for length, message in zip(lengths, messages, strict=True)
        )
        self._unsent[stream] = memoryview(b"".join(parts))
        return stream

    def pump(self, seconds: float) -> None:
        """Sends what may be sent and reads what comes, until all is sent or the time is over."""
        ends_at = time.monotonic() + seconds
        while time.monotonic() < ends_at:
            moved = [self._send(stream) for stream in list(self._unsent)]
            if (self._unsent and self.sent_all) or self.closed:
                return
            self._receive(0.0 if any(moved) else min(0.05, seconds))

    def wait(self, seconds: float, count: int = 1) -> None:
        """Reads what comes until so many calls have ended or the time is over."""
        ends_at = time.monotonic() + seconds
        while len(self.ended) < count and time.monotonic() < ends_at:
            self._receive(0.05)

    def _send(self, stream: int) -> bool:
        left = self._unsent[stream]
        size = min(len(left), _MAX_FRAME_BYTES, self._window, self._windows[stream])
        if size <= 0:
            return False
        self._socket.sendall(_frame(_DATA, 0, stream, bytes(left[:size])))
        self._unsent[stream] = left[size:]
        self._window -= size
        self._windows[stream] -= size
        return True

    def _receive(self, timeout_s: float) -> None:
        self._socket.settimeout(max(timeout_s, 1e-4))
        try:
            received = self._socket.recv(1 << 16)
        except TimeoutError:
            return
        except ConnectionError:
            received = b""
        finally:
            self._socket.settimeout(30)
        self.closed = self.closed or not received
        self._received += received
        while len(self._received) >= 9:
            size = int.from_bytes(self._received[:3], "big")
            if len(self._received) < 9 + size:
                return
            kind, flags, stream = struct.unpack(">BBI", self._received[3:9])
            self._take(kind, flags, stream, self._received[9 : 9 + size])
            self._received = self._received[9 + size :]

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _SETTINGS and not flags & _ACK:
            values = dict(struct.iter_unpack(">HI", payload))
            window = values.get(_INITIAL_WINDOW_SIZE, self.initial_window)
            self._windows = {one: size + window - self.initial_window for one, size in self._windows.items()}
            self.initial_window = window
            self._socket.sendall(_frame(_SETTINGS, _ACK, 0))
        elif kind == _PING and not flags & _ACK:
            self._socket.sendall(_frame(_PING, _ACK, 0, payload))
        elif kind == _WINDOW_UPDATE:
            (more,) = struct.unpack(">I", payload)
            if stream:
                self._windows[stream] += more
            else:
                self._window += more
        elif kind in (_HEADERS, _RST_STREAM):
            self._heads[stream] = self._heads.get(stream, b"") + (payload if kind == _HEADERS else b"")
            if kind == _RST_STREAM or flags & _END_STREAM:
                self.ended[stream] = self._heads[stream]
                self._unsent.pop(stream, None)


def _header_block(method: str, metadata: dict[str, bytes]) -> bytes:
    headers = {":method": b"POST", ":scheme": b"http", ":path": method.encode(), ":authority": b"x", "te": b"trailers"}
    fields = headers | {"content-type": b"application/grpc"} | metadata
    return b"".join(b"\0" + _string(name.encode()) + _string(value) for name, value in fields.items())


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _string(value: bytes) -> bytes:
    assert len(value) < 127, "longer strings take more than one byte of length"
    return bytes([len(value)]) + value
