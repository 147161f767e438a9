"""The page that says how much memory a server takes says so of the defaults as they are."""

from __future__ import annotations

import dataclasses

from support import memory

from layertap_server.config import Config
from layertap_server.rpc.listener import MAX_STREAM_COUNT, WINDOW_BYTES


def test_the_sums_of_the_page_are_those_of_the_defaults() -> None:
    flags = {name.replace("_", "-"): value for name, value in dataclasses.asdict(Config()).items()}
    rows = list(memory.sums(flags))
    assert len(rows) == 10
    for found, said in rows:
        assert abs(found - said) < 17 << 20, "the page rounds to MiB of whole messages"
    assert MAX_STREAM_COUNT * (WINDOW_BYTES + 1) == 8388608
