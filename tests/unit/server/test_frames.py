"""How the rows of a layer are divided into frames."""

from __future__ import annotations

import pytest

from layertap_server.config import Config
from layertap_server.protocol.responses import HEAD_BYTES, cuts

ROW_BYTES = 3072


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
