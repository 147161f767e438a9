"""How the rows of a layer are divided into frames, and written into them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from layertap import wire
from layertap.v1 import embedding_pb2 as pb
from layertap_server.config import Config
from layertap_server.protocol.frames import FrameBuffers, frames_of
from layertap_server.protocol.responses import HEAD_BYTES, cuts
from layertap_server.scheduler.events import RowsReady
from layertap_server.types import Output, OutputKind, Plan, Rows, Text

ROW_BYTES = 3072
PLAN = Plan(
    outputs=(
        Output(kind=OutputKind.POOLER_OUTPUT, layers=(12,), row_size=768),
        Output(kind=OutputKind.HIDDEN_STATES, layers=tuple(range(13)), row_size=768),
    ),
    dtype="float32",
)
MOST = Config().max_frame_bytes


def ready(data: memoryview, counts: list[int], *, first_text: int, layer: int) -> RowsReady:
    rows = Rows(run_index=0, output_index=1, layer=layer, data=data, failures={})
    return RowsReady(first_text, [Text(np.zeros(count, np.int32)) for count in counts], rows)


@pytest.mark.parametrize("row_count", [0, 1, 9, 10, 11, 20, 21, 101, 4096])
def test_frames_are_as_few_as_can_be_and_none_is_a_scrap(row_count: int) -> None:
    most = 10
    found = list(cuts(row_count, ROW_BYTES, HEAD_BYTES + most * ROW_BYTES + ROW_BYTES - 1))
    assert len(found) == -(-row_count // most)
    assert [row for first, count in found for row in range(first, first + count)] == list(range(row_count))
    counts = [count for _, count in found]
    assert max(counts, default=0) <= most
    assert max(counts, default=0) - min(counts, default=0) <= len(found)


def test_a_row_larger_than_a_frame_is_a_frame() -> None:
    assert list(cuts(2, ROW_BYTES, 16)) == [(0, 1), (1, 1)]


def test_a_layer_of_a_whole_batch_of_a_cpu_is_one_frame_that_clients_take_by_default() -> None:
    assert len(list(cuts(1024, ROW_BYTES, Config().max_frame_bytes))) == 1
    assert Config().max_frame_bytes + HEAD_BYTES < 4 << 20


@pytest.mark.parametrize("counts", [[11], [512, 512], [100] * 12], ids=str)
@pytest.mark.parametrize(("first_text", "layer"), [(0, 0), (1, 12), (200, 3), (20_000, 0)])
def test_rows_written_into_their_message_are_the_message_that_a_copy_makes(
    counts: list[int], first_text: int, layer: int
) -> None:
    rows = random.Random(0).randbytes(sum(counts) * ROW_BYTES)
    buffer = FrameBuffers(PLAN, MOST)(first_text, 1, layer, len(rows))
    assert buffer is not None and buffer.nbytes == len(rows)
    np.frombuffer(buffer, np.float32)[:] = np.frombuffer(rows, np.float32)
    (written,) = frames_of(ready(buffer, counts, first_text=first_text, layer=layer), PLAN, MOST)
    (joined,) = frames_of(ready(memoryview(rows), counts, first_text=first_text, layer=layer), PLAN, MOST)
    assert written == joined
    assert written is wire.owner_of(buffer), "the rows were copied"
    assert pb.EmbedLayersResponse.FromString(written) == pb.EmbedLayersResponse(
        frame=pb.Frame(output_index=1, layer=layer, first_text=first_text, row_count=sum(counts)), data=rows
    )


@pytest.mark.parametrize("first_text", [0, 1, 128, 20_000, 3_000_000])
@pytest.mark.parametrize("row_count", [1, 42, 43, 200, 700, 1300])
def test_payloads_begin_at_multiples_of_four_bytes(first_text: int, row_count: int) -> None:
    rows = memoryview(bytes(row_count * ROW_BYTES))
    for raw in frames_of(ready(rows, [row_count], first_text=first_text, layer=3), PLAN, 1 << 20):
        frame, data = wire.split(pb.EmbedLayersResponse, raw)
        assert len(data) == frame.frame.row_count * ROW_BYTES
        assert (len(raw) - len(data)) % 4 == 0


def test_only_rows_that_fill_one_message_are_written_into_it() -> None:
    buffers = FrameBuffers(PLAN, MOST)
    most = (MOST - HEAD_BYTES) // ROW_BYTES
    sizes = {count: buffers(0, 1, 0, count * ROW_BYTES) for count in (1, 10, 11, most, most + 1)}
    assert [count for count, buffer in sizes.items() if buffer is not None] == [11, most]


def test_a_part_of_a_buffer_is_not_taken_for_its_message() -> None:
    buffer = FrameBuffers(PLAN, MOST)(0, 1, 0, 24 * ROW_BYTES)
    assert buffer is not None
    buffer[:] = bytes(buffer.nbytes)
    (raw,) = frames_of(ready(buffer[: 12 * ROW_BYTES], [12], first_text=0, layer=0), PLAN, MOST)
    assert pb.EmbedLayersResponse.FromString(raw).frame.row_count == 12
