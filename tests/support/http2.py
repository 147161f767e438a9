"""A call in bare HTTP/2 frames, for header values that no gRPC library sends."""

from __future__ import annotations

import socket
import ssl
import struct

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS, _END_STREAM, _END_HEADERS = 0, 1, 4, 1, 4


def call(
    address: str, method: str, metadata: dict[str, bytes], *, ca: bytes | None = None, wait_s: float = 30
) -> bytes:
    """Sends an empty message to a method; returns what the server sends until the call ends."""
    host, _, port = address.rpartition(":")
    headers = {":method": b"POST", ":scheme": b"http", ":path": method.encode(), ":authority": b"x", "te": b"trailers"}
    fields = headers | {"content-type": b"application/grpc"} | metadata
    block = b"".join(b"\0" + _string(name.encode()) + _string(value) for name, value in fields.items())
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
            while b"grpc-status" not in received:
                chunk = connection.recv(1 << 16)
                if not chunk:
                    break
                received += chunk
            return received


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _string(value: bytes) -> bytes:
    assert len(value) < 127, "longer strings take more than one byte of length"
    return bytes([len(value)]) + value
