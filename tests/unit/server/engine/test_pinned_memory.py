"""Pinned host memory: pieces never overlap, come back when nothing refers to them, and slabs are given back."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from layertap_server.engine.pinned_memory import PinnedMemory


class _Driver:
    """Counts what is registered."""

    def __init__(self) -> None:
        self.registered: list[int] = []

    def __call__(self, memory: memoryview) -> Callable[[], None]:
        self.registered.append(memory.nbytes)
        return lambda: self.registered.remove(memory.nbytes)


@pytest.fixture
def driver() -> _Driver:
    return _Driver()


def test_pieces_keep_what_was_written_while_others_come_and_go(driver: _Driver) -> None:
    memory = PinnedMemory(driver, slab_bytes=1 << 16, kept_bytes=1 << 16)
    chance = random.Random(0)
    lent: list[tuple[memoryview, int]] = []
    for _ in range(2000):
        if lent and chance.random() < 0.5:
            piece, value = lent.pop(chance.randrange(len(lent)))
            assert (np.frombuffer(piece, np.uint8) == value).all()
        else:
            piece, value = memory.allocate(chance.choice([1, 255, 256, 257, 5000, 70_000])), chance.randrange(256)
            np.frombuffer(piece, np.uint8)[:] = value
            lent.append((piece, value))
    lent.clear()
    del piece
    assert memory.byte_count <= 1 << 17 and sum(driver.registered) == memory.byte_count


def test_a_slab_is_used_again_and_not_registered_again(driver: _Driver) -> None:
    memory = PinnedMemory(driver, slab_bytes=1 << 16)
    for _ in range(50):
        memory.allocate(40_000)
    assert driver.registered == [1 << 16]


def test_a_piece_takes_its_own_size_not_the_next_power_of_two(driver: _Driver) -> None:
    memory = PinnedMemory(driver, slab_bytes=1 << 20)
    pieces = [memory.allocate(260_000) for _ in range(4)]
    assert memory.byte_count == 1 << 20 and len(pieces) == 4
    assert memory.allocate((1 << 20) + 1).nbytes == (1 << 20) + 1
    assert max(driver.registered) < (1 << 20) + 4096


def test_a_view_of_a_piece_keeps_it(driver: _Driver) -> None:
    memory = PinnedMemory(driver, slab_bytes=4096)
    part = memory.allocate(4096)[100:200]
    other = memory.allocate(4096)
    np.frombuffer(other, np.uint8)[:] = 7
    assert not any(part) and len(driver.registered) == 2


def test_no_bytes_take_no_memory(driver: _Driver) -> None:
    assert PinnedMemory(driver).allocate(0).nbytes == 0 and driver.registered == []
