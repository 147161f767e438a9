"""Streams that never wait: what a pipe takes, what is dropped and counted, and what a signal handler may do."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from layertap_server.observability.bounded_streams import BoundedStream

WAIT_S = 30.0


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def read(descriptor: int, size: int) -> bytes:
    found = b""
    while len(found) < size:
        found += os.read(descriptor, size - len(found))
    return found


def test_what_is_written_arrives_in_order(pipe: tuple[int, int]) -> None:
    stream = BoundedStream(pipe[1])
    wanted = "".join(f"line {n} é \udc80\n" for n in range(1000))
    for line in wanted.splitlines(keepends=True):
        assert stream.write(line) == len(line)
    stream.drain()
    stream.flush()
    data = wanted.encode("utf-8", "backslashreplace")
    assert read(pipe[0], len(data)) == data and stream.dropped_line_count == 0
    assert stream.writable() and stream.fileno() == pipe[1] and not stream.isatty() and stream.encoding == "utf-8"


def test_lines_of_several_writers_of_one_pipe_stay_whole_when_it_is_full(pipe: tuple[int, int]) -> None:
    fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, 4096)
    streams = {letter: BoundedStream(pipe[1]) for letter in "ab"}
    lines = [100 * letter + "\n" for letter in streams for _ in range(500)]
    for line in lines:
        streams[line[0]].write(line)
    found = read(pipe[0], 101 * 1000).decode().splitlines(keepends=True)
    assert sorted(found) == sorted(lines)


def test_a_line_that_is_cut_still_ends(pipe: tuple[int, int]) -> None:
    stream = BoundedStream(pipe[1])
    stream.write("x" * (1 << 17) + "\n")
    assert read(pipe[0], 1 << 16) == b"x" * ((1 << 16) - 1) + b"\n"


def test_a_pipe_that_is_not_read_delays_nothing_and_what_it_does_not_take_is_counted(pipe: tuple[int, int]) -> None:
    stream = BoundedStream(pipe[1], max_pending=100)
    line = "x" * 9_999 + "\n"
    started = time.monotonic()
    for _ in range(1000):
        stream.write(line)
    stream.drain()
    assert time.monotonic() - started < 30
    assert 800 < stream.dropped_line_count <= 900  # The pipe has taken a few, or none yet, and 100 wait.
    dropped, taken = stream.dropped_line_count, 1000 - stream.dropped_line_count
    assert read(pipe[0], taken * len(line)) == taken * line.encode()
    stream.write("again\n")
    assert read(pipe[0], 6) == b"again\n" and stream.dropped_line_count == dropped


def test_what_cannot_be_written_is_counted_and_raises_nothing(pipe: tuple[int, int]) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    stream = BoundedStream(full)
    print("two\nlines", file=stream, flush=True)
    stream.drain()
    assert stream.dropped_line_count == 2
    os.close(full)


def test_a_descriptor_that_does_not_block_is_waited_for(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    stream = BoundedStream(pipe[1])
    for _ in range(200):
        stream.write("x" * 9_999 + "\n")
    assert read(pipe[0], 2_000_000).count(b"\n") == 200 and stream.dropped_line_count == 0


@pytest.mark.parametrize("closed", [(1, 2), (0, 1, 2), (2,)])
def test_no_file_gets_the_number_of_a_stream_that_is_closed(closed: tuple[int, ...], tmp_path: Path) -> None:
    code = """
        import os, sys
        from layertap_server.observability.bounded_streams import bounded_streams, open_descriptors
        open_descriptors()
        with bounded_streams(), open(sys.argv[1], "w") as file:
            print("printed"), print("logged", file=sys.stderr)
            file.write(str(file.fileno()))
    """
    shut = " ".join(f"{number}>&-" for number in closed)
    command = [
        "sh",
        "-c",
        f'exec "$@" {shut}',
        "sh",
        sys.executable,
        "-c",
        textwrap.dedent(code),
        str(tmp_path / "file"),
    ]
    done = subprocess.run(command, capture_output=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr
    assert int((tmp_path / "file").read_text()) > 2
    assert done.stdout == (b"" if 1 in closed else b"printed\n")
