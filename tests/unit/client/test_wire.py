"""Numbers and messages on the wire: stock protobuf is the oracle, garbage is DataLossError and nothing else."""

from __future__ import annotations

import platform
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from layertap import DataLossError, wire
from layertap.types import ITEM_BYTES
from layertap.v1 import embedding_pb2 as pb

KINDS = [pb.EmbedLayersResponse, pb.EmbedStreamResponse]
MODEST = settings(max_examples=100, deadline=None)

INT32 = st.integers(-(2**31), 2**31 - 1)
INT64 = st.integers(-(2**63), 2**63 - 1)

layers_parts = st.one_of(
    st.builds(
        lambda counts, name: pb.EmbedLayersResponse(header=pb.EmbedHeader(model_id=name, token_counts=counts)),
        st.lists(INT32, max_size=5),
        st.text(max_size=5),
    ),
    st.builds(
        lambda numbers: pb.EmbedLayersResponse(
            frame=pb.Frame(
                output_index=numbers[0],
                layer=numbers[1],
                first_text=numbers[2],
                first_row=numbers[3],
                row_count=numbers[4],
            )
        ),
        st.lists(INT32, min_size=5, max_size=5),
    ),
    st.builds(lambda count: pb.EmbedLayersResponse(summary=pb.EmbedSummary(frame_count=count)), INT64),
    st.just(pb.EmbedLayersResponse()),
)
stream_parts = st.one_of(
    st.builds(
        lambda ids, message: pb.EmbedStreamResponse(
            results=pb.StreamResults(ids=ids, failures=[pb.StreamFailure(id=1, code=3, message=message)])
        ),
        st.lists(INT64, max_size=5),
        st.text(max_size=5),
    ),
    st.builds(lambda number: pb.EmbedStreamResponse(frame=pb.StreamFrame(id=number, done=True)), INT64),
)
parts = st.one_of(layers_parts, stream_parts)


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def data_field(data: bytes) -> bytes:
    return bytes([15 << 3 | 2]) + varint(len(data)) + data


def stock(kind: type[Any], raw: bytes) -> tuple[Any, bytes]:
    """Parses with protobuf alone; returns the message without its payload, and the payload."""
    message = kind.FromString(raw)
    data = message.data
    message.ClearField("data")
    return message, data


@MODEST
@given(part=parts, data=st.binary(max_size=300))
def test_join_writes_what_protobuf_writes_and_split_reads_it(part: Any, data: bytes) -> None:
    whole = type(part)()
    whole.CopyFrom(part)
    whole.data = data
    raw = wire.join(part, data)
    assert type(part).FromString(raw) == whole
    assert raw == whole.SerializeToString()
    assert wire.join(part, memoryview(data)) == raw
    found, payload = wire.split(type(part), whole.SerializeToString())
    assert found == part and payload == data


@MODEST
@given(
    kind=st.sampled_from(KINDS),
    pieces=st.lists(
        st.one_of(
            parts.map(lambda part: part.SerializeToString()),
            st.binary(max_size=40).map(data_field),
            # Fields of a newer contract: a varint, a string, 32 and 64 bits.
            st.sampled_from([b"\xa0\x06\x96\x01", b"\xa2\x06\x02hi", b"\xa5\x06abcd", b"\xa1\x06abcdefgh"]),
            # Field 15 as a number is a field of another contract, not the payload.
            st.just(bytes([15 << 3, 7])),
        ),
        max_size=6,
    ),
)
@example(kind=pb.EmbedLayersResponse, pieces=[data_field(b"first"), data_field(b"second")])
@example(kind=pb.EmbedLayersResponse, pieces=[data_field(b"first"), data_field(b"")])
@example(kind=pb.EmbedLayersResponse, pieces=[data_field(b"early"), b"\x1a\x02\x10\x03"])
@example(kind=pb.EmbedLayersResponse, pieces=[])
def test_split_reads_any_order_of_fields_as_protobuf_does(kind: type[Any], pieces: list[bytes]) -> None:
    raw = b"".join(pieces)
    try:
        wanted, data = stock(kind, raw)
    except DecodeError:
        with pytest.raises(DataLossError):
            wire.split(kind, raw)
        return
    found, payload = wire.split(kind, raw)
    assert payload == data
    assert found == wanted
    assert found.SerializeToString(deterministic=True) == wanted.SerializeToString(deterministic=True)


@MODEST
@given(kind=st.sampled_from(KINDS), raw=st.binary(max_size=80))
@example(kind=pb.EmbedLayersResponse, raw=b"\x7a")
@example(kind=pb.EmbedLayersResponse, raw=b"\x7a\x05abc")
@example(kind=pb.EmbedLayersResponse, raw=b"\x00\x00")
@example(kind=pb.EmbedLayersResponse, raw=b"\x7a" + b"\xff" * 9 + b"\x01")
@example(kind=pb.EmbedLayersResponse, raw=b"\x0a\x02\x0a\xff")
def test_garbage_is_read_as_protobuf_reads_it_or_is_a_data_loss(kind: type[Any], raw: bytes) -> None:
    check_like_stock(kind, raw)


@MODEST
@given(data=st.data(), part=parts, payload=st.binary(min_size=1, max_size=40))
def test_cut_and_damaged_messages_are_read_as_protobuf_reads_them_or_are_a_data_loss(
    data: st.DataObject, part: Any, payload: bytes
) -> None:
    raw = bytearray(wire.join(part, payload))
    if data.draw(st.booleans(), label="cut"):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    for _ in range(data.draw(st.integers(0, 3), label="flips")):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    check_like_stock(type(part), bytes(raw))


def check_like_stock(kind: type[Any], raw: bytes) -> None:
    try:
        found, payload = wire.split(kind, raw)
    except DataLossError:
        return
    wanted, data = stock(kind, raw)
    assert found == wanted and payload == data


def test_a_cut_payload_is_a_data_loss() -> None:
    raw = wire.join(pb.EmbedLayersResponse(frame=pb.Frame(row_count=1)), b"payload")
    for end in range(len(raw) - len(b"payload") - 2, len(raw)):
        if end == len(raw) - len(b"payload") - 2:
            assert wire.split(pb.EmbedLayersResponse, raw[:end])[1] == b""
            continue
        with pytest.raises(DataLossError):
            wire.split(pb.EmbedLayersResponse, raw[:end])


def test_a_length_of_more_bytes_than_protobuf_allows_is_a_data_loss() -> None:
    overlong = bytes([15 << 3 | 2]) + b"\x83" + b"\x80" * 10 + b"\x00" + b"abc"
    with pytest.raises(DecodeError):
        pb.EmbedLayersResponse.FromString(overlong)
    with pytest.raises(DataLossError):
        wire.split(pb.EmbedLayersResponse, overlong)


@pytest.mark.timeout(10)
def test_a_megabyte_of_continued_length_is_refused_without_pondering() -> None:
    with pytest.raises(DataLossError):
        wire.split(pb.EmbedLayersResponse, b"\x7a" + b"\xff" * (1 << 20))


def test_the_payload_is_viewed_in_place() -> None:
    raw = wire.join(pb.EmbedLayersResponse(frame=pb.Frame(row_count=4)), bytes(range(64)))
    _, payload = wire.split(pb.EmbedLayersResponse, raw)
    assert payload.obj is raw
    inside = np.frombuffer(payload, np.uint8).__array_interface__["data"][0]
    whole = np.frombuffer(raw, np.uint8).__array_interface__["data"][0]
    assert inside - whole == len(raw) - 64


@pytest.mark.parametrize("name", wire.DTYPES)
def test_values_are_little_endian(name: str) -> None:
    values = [1.0, -2.5, 0.0, 3.140625]
    code = {"float32": "<f", "float16": "<e", "bfloat16": "<f"}[name]
    data = b"".join(struct.pack(code, value)[-2 if name == "bfloat16" else 0 :] for value in values)
    dtype = wire.DTYPES[name]
    target = np.full((2, 2), 7, wire.array_dtype(dtype))
    wire.read_into(target, data, dtype)
    assert target.dtype == (np.float16 if name == "float16" else np.float32)
    assert target.tolist() == [values[:2], values[2:]]


def test_every_bfloat16_is_widened_exactly() -> None:
    halves = np.arange(1 << 16, dtype="<u2")
    target = np.empty(1 << 16, np.float32)
    wire.read_into(target, halves.tobytes(), pb.DTYPE_BFLOAT16)
    assert np.array_equal(target.view(np.uint32), halves.astype(np.uint32) << 16)


def test_every_float16_and_every_kind_of_float32_comes_bit_for_bit() -> None:
    halves = np.arange(1 << 16, dtype="<u2")
    target = np.empty(1 << 16, np.float16)
    wire.read_into(target, halves.tobytes(), pb.DTYPE_FLOAT16)
    assert np.array_equal(target.view(np.uint16), halves)
    words = np.array([0, 1, 0x80000000, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0x7FC00001, 0xFFFFFFFF], "<u4")
    whole = np.empty(len(words), np.float32)
    wire.read_into(whole, words.tobytes(), pb.DTYPE_FLOAT32)
    assert np.array_equal(whole.view(np.uint32), words)


@pytest.mark.parametrize("name", wire.DTYPES)
@pytest.mark.parametrize("change", [-5, -1, 1, 4])
def test_another_size_than_the_target_needs_is_a_data_loss(name: str, change: int) -> None:
    dtype = wire.DTYPES[name]
    target = np.full((2, 3), 7, wire.array_dtype(dtype))
    with pytest.raises(DataLossError, match="bytes"):
        wire.read_into(target, bytes(6 * wire.item_bytes(dtype) + change), dtype)
    assert (target == 7).all()


def test_an_unknown_dtype_is_a_data_loss() -> None:
    for number in (pb.DTYPE_UNSPECIFIED, 4, 99):
        with pytest.raises(DataLossError, match="dtype"):
            wire.array_dtype(number)
        with pytest.raises(DataLossError, match="dtype"):
            wire.tensor_to_array(pb.Tensor(dtype=number, shape=[1], data=b"ab"))


@MODEST
@given(
    name=st.sampled_from(list(wire.DTYPES)),
    shape=st.lists(st.integers(-2, 4), max_size=3),
    data=st.binary(max_size=64),
)
@example(name="float32", shape=[1 << 40, 1 << 40], data=b"")
@example(name="float32", shape=[-1, -1], data=bytes(4))
@example(name="float32", shape=[2, 3], data=bytes(24))
def test_a_tensor_becomes_an_array_of_its_shape_or_a_data_loss(name: str, shape: list[int], data: bytes) -> None:
    tensor = pb.Tensor(dtype=wire.DTYPES[name], shape=shape, data=data)
    fits = all(size >= 0 for size in shape) and int(np.prod(shape, dtype=object)) * ITEM_BYTES[name] == len(data)
    if not fits:
        with pytest.raises(DataLossError):
            wire.tensor_to_array(tensor)
        return
    array = wire.tensor_to_array(tensor)
    assert array.shape == tuple(shape)
    assert array.flags.c_contiguous and array.flags.aligned and array.flags.writeable


def test_the_tables_name_every_number_of_the_contract() -> None:
    for table, enum in (
        (wire.DTYPES, pb.Dtype),
        (wire.POOLING_STRATEGIES, pb.PoolingStrategy),
        (wire.TRUNCATIONS, pb.Truncation),
    ):
        assert set(table.values()) == set(enum.values()) - {0}
        for name, number in table.items():
            assert enum.Name(number).endswith("_" + name.upper())
    assert set(ITEM_BYTES) == set(wire.DTYPES)
    assert {name: wire.item_bytes(number) for name, number in wire.DTYPES.items()} == ITEM_BYTES


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator has these thresholds")
def test_keep_pages_keeps_what_is_freed_and_importing_does_not() -> None:
    program = """
import resource

import numpy as np

import layertap

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        [np.ones(1 << 20, np.uint8) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def many(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        [np.ones(1 << 20, np.uint8) for _ in range(count)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), layertap.keep_pages(), faults(), many(128), layertap.keep_pages(256 << 20), many(128))
"""
    ran = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    before, _, after, beyond, _, within = ran.stdout.split()
    assert int(before) >= 20 * 1000
    assert int(after) <= 8 * 300
    assert int(beyond) >= 5 * 60 * 200, "128 MiB are more than stays"
    assert int(within) <= 128 * 300, "the first time they are new"
