"""How numbers lie on the wire: dtypes, tensors, and messages that end with their payload.

Pure: bytes and arrays in, bytes and arrays out; both ends use it. Protobuf copies a `bytes` field when
it is set, when it is serialized and when it is read. The streamed messages therefore keep their payload in
field 15, the highest one: `join` writes it behind the serialized rest, which is the same message on the
wire, and `split` views it in place. Any protobuf library reads and writes these messages.

Measured with `keep_pages` on, frames of 1 MiB over loopback into numpy arrays, medians of 8 alternating runs:
generated messages take 1.00 CPU seconds a GB (server 0.37, client 0.63), `join` and `split` 0.86 (0.30, 0.56).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.message import Message

from layertap.errors import DataLossError, ResourceExhaustedError
from layertap.types import ITEM_BYTES, FloatArray
from layertap.v1 import embedding_pb2 as pb

MessageT = TypeVar("MessageT", bound=Message)
Buffer = bytes | memoryview
ByteArray: TypeAlias = npt.NDArray[np.uint8]
"""Bytes that may be kept for good: no other code writes there."""

View: TypeAlias = Callable[[int, int], ByteArray]
"""Returns rows of the message at hand that lie in shared memory, by offset and size in bytes."""

_SERVICE = pb.DESCRIPTOR.services_by_name["EmbeddingService"]
SERVICE_NAME: str = _SERVICE.full_name
RPC_NAMES: tuple[str, ...] = tuple(_SERVICE.methods_by_name)
"""The RPCs of the service, in the contract's order."""


def _by_name(enum: Any) -> dict[str, Any]:
    """Returns the numbers of an enum by the names that users give them: the contract's without the enum's own."""
    prefix = enum.Name(0).removesuffix("UNSPECIFIED")
    return {name.removeprefix(prefix).lower(): number for name, number in enum.items() if number}


DTYPES: dict[str, pb.Dtype.ValueType] = _by_name(pb.Dtype)
DTYPE_NAMES: dict[pb.Dtype.ValueType, str] = {number: name for name, number in DTYPES.items()}
POOLING_STRATEGIES: dict[str, pb.PoolingStrategy.ValueType] = _by_name(pb.PoolingStrategy)
MIX_STRATEGIES: dict[str, pb.MixStrategy.ValueType] = _by_name(pb.MixStrategy)
WORD_POOLINGS: dict[str, pb.WordPooling.ValueType] = _by_name(pb.WordPooling)
SPAN_UNITS: dict[str, pb.SpanUnit.ValueType] = {f"{name}s": number for name, number in _by_name(pb.SpanUnit).items()}
TRUNCATIONS: dict[str, pb.Truncation.ValueType] = _by_name(pb.Truncation)
PADDING_SIDES: dict[str, pb.PaddingSide.ValueType] = _by_name(pb.PaddingSide)

_LITTLE_ENDIAN: dict[pb.Dtype.ValueType, np.dtype[np.float32] | np.dtype[np.float16]] = {
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_FLOAT16: np.dtype("<f2"),
}
"""Wire dtypes that numpy has, as they lie on the wire."""

_MAX_VARINT_BITS = 70

_KEPT_BYTES = 31 << 20
"""Just below the 32 MiB up to which glibc raises its thresholds."""
_M_TRIM_THRESHOLD = -1
"""What mallopt calls the free memory that stays."""

_DATA_FIELD = 15
_DATA_TAG = _DATA_FIELD << 3 | 2
"""Field 15, length-delimited: one byte."""


def keep_pages(byte_count: int = 62 << 20) -> None:
    """Lets this process keep the memory of messages and arrays that it frees, and use it again.

    As it starts, glibc gives what is freed back to the system at once, or nearly so, and each message of a stream and
    each array then pays for new pages: half the time of receiving layers. Once a block of 31 MiB has been freed, it
    keeps smaller ones, up to 62 MiB of free memory at the end of its heap. That concerns all code of the process, so a
    library may not decide it: call this once, before the first answers come. The server and the command line do so.
    With another allocator nothing changes.

    Args:
        byte_count: How much free memory stays at the end of the heap. A program that drops all layers of a request
            together, before it sends the next one, gains from as much as these take.
    """
    bytes(_KEPT_BYTES)
    if byte_count > 2 * _KEPT_BYTES:
        import ctypes  # Here: no other part of the client needs it.

        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_TRIM_THRESHOLD, min(byte_count, 2**31 - 1))


def array_dtype(dtype: pb.Dtype.ValueType) -> npt.DTypeLike:
    """Returns what a wire dtype becomes in numpy; bfloat16, which numpy lacks, becomes float32."""
    if dtype not in DTYPE_NAMES:
        raise DataLossError(f"the answer has the unknown dtype {dtype}; the server is newer than this client")
    return np.float16 if dtype == pb.DTYPE_FLOAT16 else np.float32


def empty(shape: tuple[int, ...], dtype: pb.Dtype.ValueType) -> FloatArray:
    """Returns a new array for wire values.

    Raises:
        ResourceExhaustedError: if this process cannot hold it.
    """
    try:
        array: FloatArray = np.empty(shape, array_dtype(dtype))
    except (MemoryError, ValueError) as exc:
        raise ResourceExhaustedError(
            f"the answer has an array of shape {list(shape)}, which this process cannot hold; ask for fewer texts or "
            "layers at once, or use embed_stream"
        ) from exc
    return array


def item_bytes(dtype: pb.Dtype.ValueType) -> int:
    """Returns the bytes one value of a wire dtype takes."""
    return ITEM_BYTES[DTYPE_NAMES[dtype]]


def read_into(target: FloatArray, data: Buffer | ByteArray, dtype: pb.Dtype.ValueType) -> None:
    """Copies wire bytes into an array, once, widening bfloat16 exactly.

    Args:
        target: C-contiguous, of `array_dtype(dtype)`.
        data: As many values as target has.
        dtype: The number format of data.

    Raises:
        DataLossError: if data has another size than target needs.
    """
    if len(data) != target.size * item_bytes(dtype):
        raise DataLossError(
            f"the answer has {len(data)} bytes where {target.size * item_bytes(dtype)} belong; ask again"
        )
    if dtype == pb.DTYPE_BFLOAT16:
        halves = np.frombuffer(data, "<u2").reshape(target.shape)
        np.left_shift(halves, 16, out=target.view(np.uint32), dtype=np.uint32)
    else:
        target[...] = np.frombuffer(data, _LITTLE_ENDIAN[dtype]).reshape(target.shape)


def to_array(data: Buffer | ByteArray, shape: tuple[int, ...], dtype: pb.Dtype.ValueType) -> FloatArray:
    """Returns wire bytes as an array: a view where they may be kept as they are, else a copy.

    Raises:
        DataLossError: if data has another size than the array.
    """
    if isinstance(data, np.ndarray) and dtype != pb.DTYPE_BFLOAT16:
        if data.size != math.prod(shape) * item_bytes(dtype):
            raise DataLossError(f"the answer has {data.size} bytes where {math.prod(shape)} values belong; ask again")
        kept: FloatArray = data.view(_LITTLE_ENDIAN[dtype])
        return kept.reshape(shape)
    array = empty(shape, dtype)
    read_into(array, data, dtype)
    return array


def joined(parts: Sequence[ByteArray]) -> ByteArray:
    """Returns arrays that lie one after the other in memory as one array, which holds them all."""
    return parts[0] if len(parts) == 1 else array_at(parts, address(parts[0]), sum(part.nbytes for part in parts))


def array_at(owner: object, start: int, byte_count: int) -> ByteArray:
    """Returns memory as an array that holds on to its owner."""
    return np.asarray(_Base(owner, start, byte_count))


def owner_of(data: memoryview) -> object:
    """Returns what the memory of an array of `array_at` belongs to; None: data is not the whole of such an array."""
    array: Any = data.obj
    base: object = array.base if isinstance(array, np.ndarray) and array.nbytes == data.nbytes else None
    return base.owner if isinstance(base, _Base) else None


class _Base:
    """The base of an array.

    numpy replaces the base of a view by the base of its base where that is an array too, and would so forget an array
    with a finalizer; at an object of another kind it stops.
    """

    __slots__ = ("__array_interface__", "owner")

    def __init__(self, owner: object, start: int, byte_count: int) -> None:
        self.owner = owner
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (byte_count,), "data": (start, False)}


def address(array: ByteArray) -> int:
    """Returns where in memory an array begins."""
    return int(array.__array_interface__["data"][0])


def tensor_to_array(tensor: pb.Tensor) -> FloatArray:
    """Returns a tensor as a new array of its shape."""
    shape, dtype, data = tuple(tensor.shape[:]), tensor.dtype, tensor.data
    array_dtype(dtype)
    if min(shape, default=0) < 0 or math.prod(shape) * item_bytes(dtype) != len(data):
        raise DataLossError(f"a tensor of shape {shape} came with {len(data)} bytes; ask again")
    if dtype == pb.DTYPE_BFLOAT16:
        return to_array(data, shape, dtype)
    array: FloatArray = np.ndarray(shape, _LITTLE_ENDIAN[dtype], bytearray(data))  # Of numpy's ways the shortest.
    return array


def join(message: Message, *data: Buffer) -> bytes:
    """Serializes a message whose field 15 is the payload, copying the parts of the payload once."""
    size = sum(map(len, data))
    if not size:
        return message.SerializeToString()
    return b"".join((message.SerializeToString(), head(_DATA_FIELD, size), *data))


def head(number: int, size: int, *, padding: int = 0) -> bytes:
    """Returns what stands before a payload in a message: the field, at most 15, and the payload's size in bytes.

    With `padding` the size is written in so many bytes more than it needs, as the format allows.
    """
    return bytes((number << 3 | 2,)) + _varint(size, padding)


def split(kind: type[MessageT], raw: bytes) -> tuple[MessageT, memoryview]:
    """Parses a message whose field 15 is the payload, and views the payload in place.

    Returns:
        The message without its payload, and the payload; empty where there is none.

    Raises:
        DataLossError: if raw is no such message.
    """
    view = memoryview(raw)
    message, payload = kind(), view[:0]
    start = position = 0
    try:
        while position < len(raw):
            tag_at = position
            tag, position = _read_varint(raw, position)
            end = _skip(raw, tag & 7, position)
            if tag == _DATA_TAG:
                size, body = _read_varint(raw, position)
                payload = view[body : body + size]
                message.MergeFromString(bytes(view[start:tag_at]))
                start = end
            position = end
        if position != len(raw):
            raise ValueError("the last field is cut")
        message.MergeFromString(bytes(view[start:]) if start else raw)
    except Exception as exc:
        raise DataLossError(f"the answer is no {kind.DESCRIPTOR.name}; is this a layertap server?") from exc
    return message, payload


def _varint(number: int, padding: int = 0) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    if padding:
        parts[-1] |= 0x80
        parts += bytes((0x80,)) * (padding - 1) + bytes((0,))
    return bytes(parts)


def _read_varint(raw: bytes, position: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = raw[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
        shift += 7
        if shift >= _MAX_VARINT_BITS:
            raise ValueError("a number goes on for too long")


def _skip(raw: bytes, wire_type: int, position: int) -> int:
    """Returns where the field whose tag ended at position ends."""
    if wire_type == 0:
        return _read_varint(raw, position)[1]
    if wire_type == 2:
        size, position = _read_varint(raw, position)
        return position + size
    if wire_type in (1, 5):
        return position + (8 if wire_type == 1 else 4)
    raise ValueError(f"wire type {wire_type}")
