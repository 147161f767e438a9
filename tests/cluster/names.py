"""A name server on the loopback interface whose answers a test can change."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Sequence

_A, _IN = 1, 1
_RESPONSE, _NO_SUCH_NAME = 0x8400, 3


class NameServer:
    """Answers for one name with addresses that may not be kept; there are no other names, and no other records.

    Attributes:
        address: Where it listens, as the authority of a `dns:` target.
    """

    def __init__(self, name: str, addresses: Sequence[str]) -> None:
        self.addresses = addresses
        self._name = b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
            end.sendto(b"", self._socket.getsockname())
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while (query := self._socket.recvfrom(4096))[0]:
            self._socket.sendto(self._answer(query[0]), query[1])

    def _answer(self, query: bytes) -> bytes:
        end = query.index(b"\0", 12) + 1
        (kind,) = struct.unpack_from("!H", query, end)
        known = query[12:end].lower() == self._name
        found = self.addresses if known and kind == _A else ()
        header = struct.pack("!HHHHH", _RESPONSE | (0 if known else _NO_SUCH_NAME), 1, len(found), 0, 0)
        # Each record points to the name in the question, at byte 12; it is good for 0 s and 4 bytes long.
        records = (struct.pack("!HHHIH", 0xC00C, _A, _IN, 0, 4) + socket.inet_aton(address) for address in found)
        return query[:2] + header + query[12 : end + 4] + b"".join(records)
