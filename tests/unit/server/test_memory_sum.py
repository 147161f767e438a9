"""The page that says how much memory a server takes says so of the defaults as they are."""

from __future__ import annotations

import dataclasses

from support import memory

from layertap_server.app.limits import cpu_batch_bytes
from layertap_server.config import Config
from layertap_server.rpc.listener import MAX_STREAM_COUNT, WINDOW_BYTES


def test_the_sums_of_the_page_are_those_of_the_defaults() -> None:
    flags = {name.replace("_", "-"): value for name, value in dataclasses.asdict(Config()).items()}
    rows = list(memory.sums(flags))
    assert len(rows) == 10
    for found, said in rows:
        assert abs(found - said) < 17 << 20, "the page rounds to MiB of whole messages"
    assert MAX_STREAM_COUNT * (WINDOW_BYTES + 1) == 8388608


def test_a_call_may_hold_a_batch_more_than_there_are_instances_unless_they_are_many() -> None:
    most, bert_base = Config().max_call_output_bytes, 1024 * 13 * 768 * 4
    assert bert_base <= cpu_batch_bytes(1, most) == 48 << 20
    assert bert_base <= cpu_batch_bytes(2, most) == most // 3
    assert cpu_batch_bytes(3, most) == cpu_batch_bytes(64, most) == cpu_batch_bytes(2, 1 << 20) == 32 << 20
