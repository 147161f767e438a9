"""Requests as messages; large ones are taken apart: what repeats is found by its lengths and parsed in slices.

protobuf makes up to 20 bytes of one, and holds the interpreter while it does. So of a large request only what stands
beside its texts is parsed at once; a text is parsed in the slice that tokenizes it. How many texts there are, and how
long each is, is checked before that.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Final, Generic, TypeVar, overload

from google.protobuf.message import DecodeError, Message

from layertap.errors import InvalidArgumentError
from layertap.types import Limits
from layertap.v1 import embedding_pb2 as pb
from layertap_server.protocol.offload import LARGE_BYTES

MessageT = TypeVar("MessageT", bound=Message)
EntryT = TypeVar("EntryT", bound=Message)

_ENTRIES: Final = 1
"""The number of the field that repeats, in all requests with texts and in StreamInputs."""
_STREAM_OPTIONS: Final = 1
_STREAM_INPUTS: Final = 2
_STREAM_INPUT: Final = 2
_MAX_FIELDS: Final = 4096
"""How many fields may stand beside the texts of a large request."""
_MAX_PARSED_BYTES: Final = 256 << 10
"""What may stand beside the texts of a request: more than all options that are accepted."""
_LENGTH_DELIMITED: Final = 2
_INPUTS_TAG: Final = bytes((_STREAM_INPUTS << 3 | _LENGTH_DELIMITED,))


class Parts(Sequence[EntryT], Generic[EntryT]):
    """Messages of one kind inside another, parsed anew whenever they are asked for.

    Attributes:
        sizes: Their sizes in bytes.
    """

    def __init__(self, kind: type[EntryT], raw: bytes, spans: Sequence[tuple[int, int]]) -> None:
        self._kind = kind
        self._raw = raw
        self._spans = spans
        self.sizes = [end - start for start, end in spans]

    def __len__(self) -> int:
        return len(self._spans)

    @overload
    def __getitem__(self, index: int) -> EntryT: ...

    @overload
    def __getitem__(self, index: slice) -> list[EntryT]: ...

    def __getitem__(self, index: int | slice) -> EntryT | list[EntryT]:
        """Returns one of them, or several.

        Raises:
            InvalidArgumentError: if the bytes are no such message.
        """
        if isinstance(index, slice):
            return [self._parse(*span) for span in self._spans[index]]
        return self._parse(*self._spans[index])

    def raw(self, index: int) -> bytes:
        """Returns the bytes of one of them."""
        start, end = self._spans[index]
        return self._raw[start:end]

    def _parse(self, start: int, end: int) -> EntryT:
        try:
            return self._kind.FromString(self._raw[start:end])
        except DecodeError as exc:
            raise _no(self._kind) from exc


async def parse(kind: type[MessageT], raw: bytes, *, bytes_field: int = 0) -> MessageT:
    """Returns a message; the texts of a large one are not in it, or in its field of bytes with this number.

    Raises:
        InvalidArgumentError: if the bytes are no such message, or too many.
    """
    try:
        if len(raw) > _MAX_PARSED_BYTES and (size := _size_beside(raw, bytes_field)) > _MAX_PARSED_BYTES:
            known = kind.DESCRIPTOR.fields_by_number
            hint = f"send them in {known[bytes_field].name}" if bytes_field else "ask for less at once"
            raise InvalidArgumentError(
                f"the request has {size} bytes beside its texts, the most is {_MAX_PARSED_BYTES}; {hint}"
            )
        return kind.FromString(raw) if len(raw) <= LARGE_BYTES else await asyncio.to_thread(kind.FromString, raw)
    except DecodeError as exc:
        raise _no(kind) from exc


async def parse_parts(
    kind: type[MessageT], entry_kind: type[EntryT], raw: bytes, limits: Limits, max_bytes: int
) -> tuple[MessageT, Sequence[EntryT]]:
    """Returns a request, and its texts, which of a large one are neither in it nor parsed.

    Args:
        kind: What it is.
        entry_kind: What its texts are.
        raw: Its bytes.
        limits: The limits in force.
        max_bytes: The most bytes of one text.

    Raises:
        InvalidArgumentError: if it is not such a request, or it or one of its texts is too large.
    """
    name = "texts" if kind is pb.DecodeRequest else "inputs"
    if len(raw) <= LARGE_BYTES:
        try:
            message = kind.FromString(raw)
        except DecodeError as exc:
            raise _no(kind) from exc
        return message, getattr(message, name)
    rest: list[bytes] = []
    spans: list[tuple[int, int]] = []
    try:
        for number, start, value, end in _fields(raw, 0, len(raw)):
            if number == _ENTRIES:
                spans.append((value, end))
                check_size(end - value, f"{name}[{len(spans) - 1}]", limits, max_bytes)
                if len(spans) > limits.max_text_count:
                    raise InvalidArgumentError(
                        f"{name} has more than {limits.max_text_count} texts, the most of one request; use "
                        "embed_stream (the RPC EmbedStream) for any number of texts, or send several requests"
                    )
            else:
                rest.append(raw[start:end])
                if len(rest) > _MAX_FIELDS:
                    raise _no(kind)
    except DecodeError as exc:
        raise _no(kind) from exc
    return await parse(kind, b"".join(rest)), Parts(entry_kind, raw, spans)


def check_size(byte_count: int, label: str, limits: Limits, max_bytes: int) -> None:
    """Checks the size of a text.

    Raises:
        InvalidArgumentError: if it has more bytes than any text within the limits.
    """
    if byte_count > max_bytes:
        raise InvalidArgumentError(
            f"{label} has {byte_count} bytes, more than any text of {limits.max_character_count} characters; split it "
            "into several texts"
        )


def stream_chunks(raw: bytes, *, count: int, byte_count: int) -> Iterator[Parts[pb.StreamInput]]:
    """Yields the texts of a message of EmbedStream, so many at once as fit both bounds, but always one.

    Raises:
        InvalidArgumentError: if the message is no such message, or carries options.
    """
    spans: list[tuple[int, int]] = []
    total = 0
    try:
        for span in _stream_spans(raw):
            size = span[1] - span[0]
            if spans and (len(spans) == count or total + size > byte_count):
                yield Parts(pb.StreamInput, raw, spans)
                spans, total = [], 0
            spans.append(span)
            total += size
    except DecodeError as exc:
        raise _no(pb.EmbedStreamRequest) from exc
    if spans:
        yield Parts(pb.StreamInput, raw, spans)


def stream_inputs(raw: bytes, *, count: int) -> Sequence[pb.StreamInput] | None:
    """Returns the texts of a message of EmbedStream, parsed at once. None: it has more, or anything else in it.

    Raises:
        InvalidArgumentError: if one of them is no text.
    """
    if not raw.startswith(_INPUTS_TAG):
        return None
    try:
        size, start = _varint(raw, 1, len(raw))
        if start + size != len(raw):
            return None
        inputs = pb.StreamInputs.FromString(raw[start:]).inputs
    except DecodeError as exc:
        raise _no(pb.EmbedStreamRequest) from exc
    return inputs if len(inputs) <= count else None


def stream_id(raw: bytes) -> int:
    """Returns the id of a StreamInput whose text is too large to be parsed.

    Raises:
        InvalidArgumentError: if it is no StreamInput.
    """
    try:
        fields = itertools.islice(_fields(raw, 0, len(raw)), _MAX_FIELDS)
        rest = b"".join(raw[start:end] for number, start, _, end in fields if number != _STREAM_INPUT)
        return pb.StreamInput.FromString(rest[:_MAX_FIELDS]).id
    except DecodeError as exc:
        raise _no(pb.EmbedStreamRequest) from exc


def _stream_spans(raw: bytes) -> Iterator[tuple[int, int]]:
    other_count, found = 0, False
    for number, _, start, end in _fields(raw, 0, len(raw)):
        if number == _STREAM_OPTIONS:
            raise InvalidArgumentError("only the first message carries options; send inputs in each later one")
        found = found or number == _STREAM_INPUTS
        for inner, _, value, value_end in _fields(raw, start, end) if number == _STREAM_INPUTS else ():
            if inner == _ENTRIES:
                yield value, value_end
            else:
                other_count += 1
        other_count += 1
        if other_count > _MAX_FIELDS:
            raise DecodeError
    if not found:
        raise InvalidArgumentError("only the first message carries options; send inputs in each later one")


def _size_beside(raw: bytes, bytes_field: int) -> int:
    """Returns how many bytes of a message are not the values of one of its fields, of which there are few.

    Raises:
        DecodeError: if the bytes are no message.
    """
    if not bytes_field:
        return len(raw)
    fields = itertools.islice(_fields(raw, 0, len(raw)), _MAX_FIELDS)
    return len(raw) - sum(end - value for number, _, value, end in fields if number == bytes_field)


def _fields(raw: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields the fields of a message: number, where it starts, where its value starts, and where it ends.

    The number is 0 for all that has no length of its own.

    Raises:
        DecodeError: if the bytes are no message.
    """
    depth = 0
    while at < end:
        start = at
        tag, at = _varint(raw, at, end)
        number, kind = tag >> 3, tag & 7
        if not number:
            raise DecodeError
        value = at
        if kind == _LENGTH_DELIMITED:
            size, value = _varint(raw, at, end)
            at = value + size
        elif kind == 0:
            _, at = _varint(raw, at, end)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind in (3, 4):
            depth += 1 if kind == 3 else -1
        if at > end or depth < 0 or kind > 5:
            raise DecodeError
        yield 0 if depth or kind != _LENGTH_DELIMITED else number, start, value, at
    if depth:
        raise DecodeError


def _varint(raw: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise DecodeError


def _no(kind: type[Message]) -> InvalidArgumentError:
    return InvalidArgumentError(f"the request is no {kind.DESCRIPTOR.name}; send what the contract describes")


def sizes_of(entries: Sequence[Any]) -> list[int]:
    """Returns the sizes of messages in bytes."""
    return entries.sizes if isinstance(entries, Parts) else [one.ByteSize() for one in entries]
