"""Large requests are taken apart as protobuf would parse them, without being parsed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest

from layertap.errors import InvalidArgumentError
from layertap.types import Limits
from layertap.v1 import embedding_pb2 as pb
from layertap_server.protocol.offload import LARGE_BYTES
from layertap_server.protocol.requests import parse_parts, sizes_of, stream_chunks, stream_id, stream_inputs

LIMITS = Limits(
    **{field.name: 1 << 20 for field in pb.Limits.DESCRIPTOR.fields if field.name != "max_text_count"},
    max_text_count=1000,
)
OPTIONS = pb.EmbedOptions(outputs=[pb.Output(hidden_states=pb.HiddenStates(layers=[1, -1]))], return_tokens=True)
UNKNOWN = b"\xf8\x07\x01" + b"\xfa\x07\x03abc" + b"\xfd\x07abcd" + b"\xf9\x07abcdefgh" + b"\xfb\x07\x0a\x00\xfc\x07"
"""Fields of all wire types with the number 127, among them a group that has a field 1 of its own."""


def inputs(count: int, chance: random.Random) -> list[pb.Input]:
    kinds = [
        pb.Input(text="w" * chance.randrange(400)),
        pb.Input(pair=pb.TextPair(first="a", second="b" * 300)),
        pb.Input(words=pb.Words(words=["", "a"])),
        pb.Input(token_ids=pb.TokenIds(input_ids=[101, -1, 30521])),
        pb.Input(),
    ]
    return [chance.choice(kinds) for _ in range(count)]


def parsed(raw: bytes, max_bytes: int = 1 << 20) -> tuple[pb.EmbedRequest, Sequence[pb.Input]]:
    return asyncio.run(parse_parts(pb.EmbedRequest, pb.Input, raw, LIMITS, max_bytes))


@pytest.mark.parametrize("seed", range(10))
def test_parts_are_those_of_the_parsed_message(seed: int) -> None:
    chance = random.Random(seed)
    pieces = [pb.EmbedRequest(inputs=[one]).SerializeToString() for one in inputs(900, chance)]
    pieces += [UNKNOWN, pb.EmbedRequest(options=OPTIONS).SerializeToString(), b"\x0a\x00" * 20]
    pieces += [pb.EmbedRequest(inputs=[pb.Input(text="x" * LARGE_BYTES)]).SerializeToString()]
    chance.shuffle(pieces)
    raw = b"".join(pieces)
    whole = pb.EmbedRequest.FromString(raw)
    message, parts = parsed(raw)
    assert not message.inputs and message.options == whole.options == OPTIONS
    assert parts[:] == list(whole.inputs) and len(parts) == len(whole.inputs)
    assert parts[7] == whole.inputs[7] and parts[3:300:5] == whole.inputs[3:300:5]
    assert sizes_of(parts) == sizes_of(whole.inputs)


def test_small_requests_are_parsed_at_once() -> None:
    whole = pb.EmbedRequest(inputs=inputs(3, random.Random(1)), options=OPTIONS)
    message, parts = parsed(whole.SerializeToString())
    assert message == whole and list(parts) == list(whole.inputs)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\x0a\x00" * LARGE_BYTES, "more than 1000 texts"),
        (pb.EmbedRequest(inputs=[pb.Input(text="x" * (2 << 20))]).SerializeToString(), r"inputs\[0\] has 2097"),
        (pb.EmbedRequest(options={"prompt": "x" * (1 << 20)}).SerializeToString(), "beside its texts"),
        (b"\x12\x00" * LARGE_BYTES, "no EmbedRequest"),
        (pb.EmbedRequest(inputs=[pb.Input(text="x" * LARGE_BYTES)]).SerializeToString()[:-1], "no EmbedRequest"),
        (bytes(LARGE_BYTES + 1), "no EmbedRequest"),
        (b"\x0b" * (LARGE_BYTES + 1), "no EmbedRequest"),
        (b"\xff" * (LARGE_BYTES + 1), "no EmbedRequest"),
        (b"\x0a\xff\xff\xff\xff\x0f" + bytes(LARGE_BYTES), "no EmbedRequest"),
    ],
    ids=["texts", "text", "options", "fields", "cut", "zeros", "groups", "ones", "length"],
)
def test_what_is_too_much_or_no_message_is_refused(raw: bytes, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        parsed(raw)


def test_mutated_requests_are_refused_or_read_as_protobuf_reads_them() -> None:
    chance = random.Random(3)
    good = pb.EmbedRequest(inputs=inputs(400, chance), options=OPTIONS).SerializeToString()
    assert len(good) > LARGE_BYTES // 4
    good += pb.EmbedRequest(inputs=[pb.Input(text="x" * LARGE_BYTES)]).SerializeToString()
    read = 0
    for _ in range(300):
        raw = bytearray(good)
        raw[chance.randrange(len(raw) - LARGE_BYTES)] ^= 1 << chance.randrange(8)
        try:
            message, parts = parsed(bytes(raw))
            found = list(parts)
        except InvalidArgumentError:
            continue
        whole = pb.EmbedRequest.FromString(bytes(raw))
        assert found == list(whole.inputs) and message.options == whole.options
        read += 1
    assert read > 50


def test_a_message_of_a_stream_comes_in_chunks() -> None:
    texts = [pb.StreamInput(id=n, input=one) for n, one in enumerate(inputs(2000, random.Random(2)))]
    halves = [pb.EmbedStreamRequest(inputs=pb.StreamInputs(inputs=half)) for half in (texts[:900], texts[900:])]
    raw = b"".join(half.SerializeToString() for half in halves) + UNKNOWN
    chunks = list(stream_chunks(raw, count=256, byte_count=20_000))
    assert [one for chunk in chunks for one in chunk] == texts
    assert max(len(chunk) for chunk in chunks) <= 256 and max(sum(chunk.sizes) for chunk in chunks) <= 20_000
    assert len(chunks) > 8
    large = pb.StreamInput(id=-7, input=pb.Input(text="x" * 50_000))
    raw = pb.EmbedStreamRequest(inputs=pb.StreamInputs(inputs=[large, texts[0]])).SerializeToString()
    first, second = stream_chunks(raw, count=256, byte_count=20_000)
    assert list(first) == [large] and list(second) == [texts[0]]
    assert stream_id(first.raw(0)) == -7


def test_a_message_of_few_texts_is_parsed_at_once_and_any_other_is_not() -> None:
    texts = [pb.StreamInput(id=n, input=one) for n, one in enumerate(inputs(100, random.Random(3)))]
    raw = pb.EmbedStreamRequest(inputs=pb.StreamInputs(inputs=texts)).SerializeToString()
    assert (
        stream_inputs(raw, count=100)
        == texts
        == [one for part in stream_chunks(raw, count=7, byte_count=999) for one in part]
    )
    assert stream_inputs(raw, count=99) is None
    options = pb.EmbedStreamRequest(options=pb.StreamOptions()).SerializeToString()
    for other in (b"", options, options + raw, raw + options, raw + UNKNOWN, raw + raw, raw[:-1]):
        assert stream_inputs(other, count=200) is None
    with pytest.raises(InvalidArgumentError):
        stream_inputs(b"\x12\x02\x0a\x05", count=100)


@pytest.mark.parametrize("raw", [b"", b"\x0a\x00", b"\x0a\x00\x12\x00", b"\x12\x02\x0a", b"\x12\x00" * 5000])
def test_a_message_of_a_stream_without_inputs_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidArgumentError):
        list(stream_chunks(raw, count=256, byte_count=1000))
