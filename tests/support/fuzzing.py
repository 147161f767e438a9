"""Requests that no client sends: made at random from the contract itself, mutated, or no messages at all.

What the contract describes is filled in by its descriptors, so a field that is added is fuzzed from the first day. The
values lean to what nearly makes sense: what validation refuses reaches nothing behind it. One case is one call; it
must end, with a code that the contract names. `bench/fuzz.py` runs many of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import Message

from layertap import wire
from layertap.v1 import embedding_pb2 as pb

SERVICE = f"/{wire.SERVICE_NAME}/"
REQUESTS: dict[str, type[Message]] = {name: getattr(pb, f"{name}Request") for name in wire.RPC_NAMES}
RPCS = [*REQUESTS, "Embed", "EmbedLayers", "EmbedStream", "EmbedStream", "NoSuchRpc"]
"""The embed RPCs come more often."""

CODES = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
"""What a call may end with, whatever was sent. An RPC that does not exist is UNIMPLEMENTED."""

CASE_TIMEOUT_S = 60.0
VOCABULARY = 30522
WORDS = [
    "paris",
    "love",
    "the",
    "##s",
    "[MASK]",
    "é",
    "漢字",
    "🙂",
    "\u0301",
    "\x00",
    "\u202e",
    "a",
    31 * "a",
    "12",
    "!?",
    "\t",
]
_SENDING = "Internal error from Core"
"""What gRPC's own client makes of a call that the server has ended while there was more to send; the code is lost."""
NUMBERS = (*range(-2, 5), *range(-2, 5), 16, 101, 512, 513, 2**31 - 1, -(2**31))


class FuzzError(Exception):
    """A call has ended as none may."""


def message(kind: type[Message], chance: random.Random, depth: int = 0) -> Message:
    """Returns a message of a kind, filled in at random."""
    made = kind()
    oneofs = {oneof.name: chance.choice(oneof.fields) for oneof in kind.DESCRIPTOR.oneofs}
    for field in kind.DESCRIPTOR.fields:
        chosen = field.containing_oneof is None or oneofs[field.containing_oneof.name] is field
        # Messages hold what is asked for: most are there. Options are mostly left alone.
        likely = 0.97 if field.type == Field.TYPE_MESSAGE or field.containing_oneof else 0.15
        if not chosen or chance.random() > likely or depth > 8:
            continue
        if field.is_repeated:
            counts = (0, 1, 1, 2, 3, 7) if field.type == Field.TYPE_MESSAGE else (1, 2, 5, 40)
            getattr(made, field.name).extend(_value(field, chance, depth) for _ in range(chance.choice(counts)))
        elif field.type == Field.TYPE_MESSAGE:
            getattr(made, field.name).CopyFrom(_value(field, chance, depth))
        else:
            setattr(made, field.name, _value(field, chance, depth))
    return _likely(made, chance)


def _likely(made: Message, chance: random.Random) -> Message:
    """Returns a message, mostly as one that can be computed: at random few would be."""
    if isinstance(made, pb.EmbedOptions) and chance.random() < 0.5:
        made = pb.EmbedOptions(shared_memory=made.shared_memory if made.HasField("shared_memory") else None)
        made.outputs.append(pb.Output(hidden_states=pb.HiddenStates(all_layers=True)))
        if chance.random() < 0.3:
            made.max_length = 8
            made.windows.stride = chance.choice((0, 2, 5))
            made.outputs.append(pb.Output(pooled_vectors=pb.PooledVectors()))
        if chance.random() < 0.3:
            made.outputs.append(pb.Output(span_vectors=pb.SpanVectors()))
    elif isinstance(made, pb.EmbedOptions) and chance.random() < 0.9:
        made.ClearField("windows")
    if isinstance(made, pb.Input) and chance.random() < 0.9:
        made.ClearField("spans")
        if chance.random() < 0.1:
            made.spans.CopyFrom(pb.Spans(unit=pb.SPAN_UNIT_TOKEN, bounds=(0, 1)))
    if isinstance(made, pb.TokenIds) and chance.random() < 0.8:
        count = chance.choice((1, 2, 7, 30, 300))
        for name, end in (("input_ids", VOCABULARY), ("attention_mask", 2), ("token_type_ids", 2)):
            if name == "input_ids" or chance.random() < 0.5:
                del getattr(made, name)[:]
                getattr(made, name).extend(chance.randrange(end) for _ in range(count))
    return made


def _value(field: Field, chance: random.Random, depth: int) -> Any:
    if field.type == Field.TYPE_MESSAGE:
        return message(field.message_type._concrete_class, chance, depth + 1)
    if field.type == Field.TYPE_ENUM:
        return chance.choice([value.number for value in field.enum_type.values] * 8 + [99, -1])
    if field.type == Field.TYPE_BOOL:
        return chance.random() < 0.5
    if field.type == Field.TYPE_STRING:
        return " ".join(chance.choice(WORDS) for _ in range(chance.choice((0, 1, 3, 10, 10, 600))))
    if field.type == Field.TYPE_BYTES:
        return chance.randbytes(chance.choice((0, 1, 16, 100)))
    if field.type in (Field.TYPE_FLOAT, Field.TYPE_DOUBLE):
        return chance.choice((0.0, 1.0, -1.0, 0.5, 1e30, float("inf"), float("nan")))
    if field.type in (Field.TYPE_INT64, Field.TYPE_UINT64):
        return chance.randrange(1000)
    return chance.choice(NUMBERS)


def mutated(raw: bytes, chance: random.Random) -> bytes:
    """Returns bytes like these, but for what chance does to them."""
    data = bytearray(raw)
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(len(data) + 1)
        kind = chance.randrange(5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = chance.randbytes(chance.choice((1, 4, 40)))
        elif kind == 3:
            data[at:at] = data[: chance.randrange(len(data) + 1)]
        elif at < len(data):
            data[at] = chance.choice((0, 0x7F, 0x80, 0xFF))
    return bytes(data)


def heavy(rpc: str, chance: random.Random) -> list[bytes]:
    """Returns what one call sends where one of its lists or strings is long: its length is of a heavy tail."""
    count = min(int(1000 * chance.paretovariate(0.7)), 4_000_000)
    ids = bytes(min(count, 1 << 20))
    kind = chance.randrange(6)
    entry, entries = pb.Input(text="a"), 1
    if kind == 0:
        entry = pb.Input(text=chance.choice(("a ", "word ", "\u00e9", "-")) * (count // 4))
    elif kind == 1:
        entry = pb.Input(words=pb.Words(words=[chance.choice(("", "a"))] * min(count, 400_000)))
    elif kind == 2:
        entry = pb.Input(token_ids=pb.TokenIds.FromString(_field(1, ids)))
    elif kind == 3:
        entry, entries = chance.choice((pb.Input(), pb.Input(text=""), pb.Input(text="a"))), count
    options = pb.EmbedOptions(outputs=[pb.Output(pooled_vectors=pb.PooledVectors())], truncation=pb.TRUNCATION_RIGHT)
    raw_options = options.SerializeToString()
    if kind == 4:
        raw_options += _field(chance.choice((1, 7, 1000)), bytes(count))
    elif kind == 5:
        raw_options = _field(1, _field(1, _field(1, ids)))
    if rpc == "Decode":
        return [_field(1, entry.token_ids.SerializeToString()) * min(entries, 1 << 20)]
    if rpc == "EmbedStream":
        inputs = (
            _field(1, _field(2, entry.SerializeToString()) + b"\x08" + _varint(n)) for n in range(min(entries, 30_000))
        )
        return [_field(1, _field(1, raw_options)), _field(2, b"".join(inputs))]
    return [_field(1, entry.SerializeToString()) * entries + _field(2, raw_options)]


def _field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*made, value])


def requests(rpc: str, chance: random.Random, segment: pb.ShareMemoryResponse | None) -> list[bytes]:
    """Returns what one call sends."""
    kind = REQUESTS.get(rpc, pb.EmbedRequest)
    made = [message(kind, chance)]
    if isinstance(made[0], pb.EmbedStreamRequest):
        made += [message(kind, chance) for _ in range(chance.choice((0, 1, 2, 5)))]
        if chance.random() < 0.9:
            for first, one in enumerate(made):
                wrong = one.WhichOneof("kind") != ("inputs" if first else "options")
                if wrong:
                    part = one.inputs if first else one.options
                    part.CopyFrom(message(type(part), chance))
    for one in made:
        options = getattr(one, "options", None)
        options = getattr(options, "options", options)
        if segment is not None and isinstance(options, pb.EmbedOptions) and options.HasField("shared_memory"):
            options.shared_memory.segment_id = segment.segment_id
    raw = [one.SerializeToString() for one in made]
    return [
        chance.randbytes(chance.choice((0, 1, 10, 1000))) if (dice := chance.random()) < 0.05
        else mutated(one, chance) if dice < 0.3
        else one
        for one in raw
    ]  # fmt: skip


class Fuzzer:
    """Makes calls to one server and counts what becomes of them.

    Attributes:
        codes: How often each RPC ended with each code.
    """

    def __init__(self, address: str, *, heavy_share: float = 0.0) -> None:
        """Makes no call yet.

        Args:
            address: The server's.
            heavy_share: How many calls have long lists and strings; half of those are compressed.
        """
        self._address = address
        self._heavy_share = heavy_share
        self.codes: Counter[tuple[str, str]] = Counter()

    async def run(self, count: int, *, seed: int, concurrency: int = 16) -> None:
        """Makes so many calls.

        Raises:
            FuzzError: One has not ended, or with a code that the contract does not name.
        """
        seeds = iter(range(seed, seed + count))
        options = [("grpc.max_receive_message_length", -1)]
        async with grpc.aio.insecure_channel(self._address, options=options) as channel, _lease(channel) as segment:
            tasks = [asyncio.create_task(self._calls(channel, seeds, segment)) for _ in range(concurrency)]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _calls(
        self, channel: grpc.aio.Channel, seeds: Any, segment: tuple[pb.ShareMemoryResponse, mmap.mmap] | None
    ) -> None:
        for seed in seeds:
            chance = random.Random(seed)
            if segment is not None:
                _scribble(*segment, chance)
            rpc = chance.choice(RPCS)
            is_heavy = chance.random() < self._heavy_share and rpc not in ("ShareMemory", "NoSuchRpc")
            sent = heavy(rpc, chance) if is_heavy else requests(rpc, chance, segment[0] if segment else None)
            leaves_after = chance.choice((None, None, None, None, 0, 1, 3))
            compression = grpc.Compression.Gzip if is_heavy and chance.random() < 0.5 else None
            code, details = await _call(channel, rpc, sent, leaves_after, compression)
            if details == _SENDING:
                self.codes[rpc, "ended while sending"] += 1
                continue
            self.codes[rpc, code.name] += 1
            allowed = {grpc.StatusCode.UNIMPLEMENTED} if rpc == "NoSuchRpc" else CODES
            if code not in allowed and code is not grpc.StatusCode.CANCELLED:
                raise FuzzError(f"seed {seed}: {rpc} has ended with {code.name}: {details}")


async def _call(
    channel: grpc.aio.Channel,
    rpc: str,
    sent: Sequence[bytes],
    leaves_after: int | None,
    compression: grpc.Compression | None = None,
) -> tuple[grpc.StatusCode, str]:
    """Makes one call; a caller may leave after so many answers. A lease, which never ends, is always left."""
    call = channel.stream_stream(SERVICE + rpc, None, None)(timeout=CASE_TIMEOUT_S, compression=compression)
    if rpc == "ShareMemory":
        leaves_after = 1
    with contextlib.suppress(grpc.RpcError, asyncio.CancelledError, asyncio.InvalidStateError):
        for one in sent[: None if rpc in ("EmbedStream", "NoSuchRpc") else 1]:
            await call.write(one)
        if leaves_after != 0:
            await call.done_writing()
        came = 0
        while came != leaves_after and await call.read() is not grpc.aio.EOF:
            came += 1
    if not call.done():
        call.cancel()
    return await call.code(), await call.details() or ""


@contextlib.asynccontextmanager
async def _lease(channel: grpc.aio.Channel) -> AsyncIterator[tuple[pb.ShareMemoryResponse, mmap.mmap] | None]:
    """Yields memory that the server shares, and its map; None where it shares none."""
    call = channel.unary_stream(SERVICE + "ShareMemory", None, None)(b"")
    try:
        raw = await call.read()
    except grpc.RpcError:
        yield None
        return
    answer = pb.ShareMemoryResponse.FromString(raw)
    descriptor = os.open(f"/proc/{answer.process_id}/fd/{answer.file_descriptor}", os.O_RDWR)
    try:
        with mmap.mmap(descriptor, answer.byte_count) as memory:
            yield answer, memory
    finally:
        os.close(descriptor)
        call.cancel()


def _scribble(segment: pb.ShareMemoryResponse, memory: mmap.mmap, chance: random.Random) -> None:
    """Writes anything into the tables that a caller may write to, and into the rows."""
    for _ in range(4):
        at = chance.randrange(segment.byte_count - 64)
        if chance.random() < 0.8:
            at = chance.randrange(segment.slot_offset, segment.call_offset + 8 * segment.call_count - 64)
        memory[at : at + 8] = chance.choice((bytes(8), b"\1" * 8, b"\2" * 8, b"\xff" * 8, chance.randbytes(8)))
