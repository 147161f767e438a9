"""Files that are read again: what a change, half a file, an unusable one and a file system that hangs do."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from pathlib import Path

import pytest

from layertap_server.rpc.file_reload import ReloadedFiles

WAIT_S = 30.0


def replaced(path: Path, text: str) -> None:
    """Puts another file in the place of one, as programs that rotate secrets do."""
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


def checked(files: ReloadedFiles[str]) -> str:
    """Returns what is in force after the two checks that a change takes."""
    files.check()
    files.check()
    return files.get()


def good(path: Path) -> str:
    if (content := path.read_text()).startswith("bad"):
        raise ValueError(f"it is {content}")
    return content


def test_a_changed_file_is_read_again_and_a_bad_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "file"
    path.write_text("one")
    files = ReloadedFiles("the file", [str(path)], lambda: good(path))
    first = files.get()
    assert checked(files) is first == "one"

    replaced(path, "bad")
    for _ in range(3):
        assert checked(files) is first
    assert caplog.messages == ["the file changed and cannot be used, the old stays in force: it is bad"]

    path.unlink()
    for _ in range(3):
        assert checked(files) is first
    assert len(caplog.messages) == 2 and "No such file" in caplog.messages[1]
    replaced(path, "two")
    second = checked(files)
    assert second == "two" and checked(files) is second
    assert caplog.messages[2:] == ["the file changed and is in force"]

    path.unlink()
    os.mkfifo(path)
    assert checked(files) is second and "not a regular file" in caplog.messages[3]


def test_files_are_read_once_they_change_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cert, key = tmp_path / "cert", tmp_path / "key"
    for path in (cert, key):
        path.write_text("1")

    def read() -> str:
        assert cert.read_text() == key.read_text()
        return key.read_text()

    files = ReloadedFiles("the pair", [str(cert), str(key)], read)
    replaced(cert, "22")
    files.check()
    replaced(key, "22")
    files.check()
    assert files.get() == "1" and checked(files) == "22" and not caplog.messages


def test_files_that_could_not_be_used_are_tried_again_after_a_minute(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "file"
    path.write_text("now")
    valid, now = {"now"}, 0.0

    def read() -> str:
        if (content := path.read_text()) not in valid:
            raise ValueError("it is not valid yet")
        return content

    files = ReloadedFiles("the file", [str(path)], read, clock=lambda: now)
    replaced(path, "later")
    assert checked(files) == "now"
    valid.add("later")
    assert checked(files) == "now"
    now = 60.0
    assert checked(files) == "later" and caplog.text.count("not valid yet") == 1


def test_what_is_missing_or_bad_at_first_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError):
        ReloadedFiles("the file", [str(path)], lambda: good(path))
    path.write_text("bad")
    with pytest.raises(ValueError, match="it is bad"):
        ReloadedFiles("the file", [str(path)], lambda: good(path))


def test_files_are_followed_without_a_call_and_a_file_system_that_hangs_holds_up_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    answers, asked = threading.Event(), threading.Event()
    answers.set()

    def read() -> str:
        asked.set()
        assert answers.wait(WAIT_S)
        return path.read_text()

    files = ReloadedFiles("the file", [str(path)], read)

    async def follow() -> None:
        found: asyncio.Queue[str] = asyncio.Queue()
        following = asyncio.create_task(files.follow(found.put_nowait))
        answers.clear()
        asked.clear()
        replaced(path, "two")
        while not asked.is_set():  # The event loop goes on meanwhile.
            await asyncio.sleep(0.01)
        assert files.get() == "one"
        answers.set()
        while await found.get() != "two":
            pass
        assert files.get() == "two"
        following.cancel()

    asyncio.run(asyncio.wait_for(follow(), WAIT_S))
