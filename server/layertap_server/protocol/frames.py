"""Rows as messages of EmbedLayers, each below the frame size and with its payload behind its head.

gRPC for Python sends `bytes` and nothing else, so rows in any other memory are copied once more to be sent. Rows that
the CPU computes need not be: `FrameBuffers` makes the message first and lets the engine write behind its head. CPython
allows that for a `bytes` object that was just made without contents, as long as nothing else knows it.

Every payload begins at a multiple of 4 bytes, in the buffer as in the message that the other end gets, so that rows can
be written and read as numbers where they lie. `shared_rows` decides which rows are sent by their offset instead.
"""

from __future__ import annotations

import bisect
import ctypes
import itertools
from collections.abc import Iterator
from typing import Final

from layertap import wire
from layertap.v1 import embedding_pb2 as pb
from layertap_server.protocol.responses import HEAD_BYTES, cuts, shared_rows
from layertap_server.scheduler.events import RowsReady
from layertap_server.shared_memory.segment import Lending
from layertap_server.types import Plan

_LEAST_BYTES: Final = 32 << 10
"""Fewer bytes of rows are copied in less time than it takes to make their message first."""

_ALIGNMENT: Final = 4
"""What the items of all dtypes are aligned to. The memory of a `bytes` object begins at a multiple of it."""

_new_bytes = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t)(
    ("PyBytes_FromStringAndSize", ctypes.pythonapi)
)
_address = ctypes.PYFUNCTYPE(ctypes.c_size_t, ctypes.py_object)(("PyBytes_AsString", ctypes.pythonapi))


class FrameBuffers:
    """Buffers in messages, behind the heads that belong to their rows: an allocator. Any instance may call it."""

    def __init__(self, plan: Plan, max_frame_bytes: int) -> None:
        self._plan = plan
        self._most_bytes = max_frame_bytes - HEAD_BYTES

    def __call__(self, first_text: int, output_index: int, layer: int, byte_count: int) -> memoryview | None:
        """Returns a buffer for rows that fill one message; None: they are small, or too many for one."""
        if not _LEAST_BYTES <= byte_count <= self._most_bytes:
            return None
        row_count = byte_count // self._plan.row_bytes(self._plan.outputs[output_index])
        frame = pb.Frame(output_index=output_index, layer=layer, first_text=first_text, row_count=row_count)
        head = _head(frame, byte_count)
        message: bytes = _new_bytes(None, len(head) + byte_count)
        start = _address(message)
        ctypes.memmove(start, head, len(head))
        return wire.array_at(message, start + len(head), byte_count).data


def frames_of(ready: RowsReady, plan: Plan, max_frame_bytes: int, lending: Lending | None = None) -> Iterator[bytes]:
    """Yields rows of one layer of some texts as messages; rows in shared memory are one, with their offset."""
    rows = ready.rows
    output = plan.outputs[rows.output_index]
    row_bytes = plan.row_bytes(output)
    row_count = len(rows.data) // row_bytes

    def frame(text: int, row: int, count: int) -> pb.Frame:
        return pb.Frame(
            output_index=rows.output_index, layer=rows.layer, first_text=text, first_row=row, row_count=count
        )

    if shared := shared_rows([rows.data], lending):
        whole = frame(ready.first_text, ready.first_row, row_count)
        yield pb.EmbedLayersResponse(frame=whole, shared_rows=shared).SerializeToString()
        return
    if (message := _message_around(rows.data)) is not None:
        yield message
        return
    starts = list(itertools.accumulate(output.row_counts(ready.texts), initial=-ready.first_row))
    for first, count in cuts(row_count, row_bytes, max_frame_bytes):
        text = bisect.bisect_right(starts, first) - 1
        data = rows.data[first * row_bytes : (first + count) * row_bytes]
        yield b"".join((_head(frame(ready.first_text + text, first - starts[text], count), len(data)), data))


def _head(frame: pb.Frame, byte_count: int) -> bytes:
    """Returns what stands before the rows of a frame."""
    own = frame.SerializeToString()
    end = wire.head(pb.EmbedLayersResponse.DATA_FIELD_NUMBER, byte_count)
    padding = -(2 + len(own) + len(end)) % _ALIGNMENT
    return wire.head(pb.EmbedLayersResponse.FRAME_FIELD_NUMBER, len(own), padding=padding) + own + end


def _message_around(data: memoryview) -> bytes | None:
    """Returns the message that a buffer lies in. None: it is no whole buffer of `FrameBuffers`."""
    message = wire.owner_of(data)
    return message if isinstance(message, bytes) else None
