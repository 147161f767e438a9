"""`layertap embed` on a corpus of several files: each becomes a file, and what is finished is passed over."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support import Server

from layertap.cli import main

POOLED = ("--pooling", "mean")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Four files, one of them empty."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for n in range(3):
        lines = [json.dumps({"id": f"{n} {line}", "text": f"paris {line} " * (1 + line % 5)}) for line in range(90)]
        (folder / f"{n}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "empty.jsonl").touch()
    return folder


def run(server: Server, corpus: Path | str, output: Path, *flags: str) -> int:
    own = ["--target", server.address, "--id-field", "id", "--part-texts", "50", *POOLED]
    return main(["embed", str(corpus), "-o", str(output), *own, *flags])


def test_shares_of_a_folder_make_the_files_that_single_commands_make(
    tiny_server: Server, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for share in ("0/2", "1/2"):
        assert run(tiny_server, corpus, out, "--shard", share) == 0
    assert sorted(path.name for path in out.iterdir()) == ["0.parquet", "1.parquet", "2.parquet", "_layertap"]
    for n in range(3):
        assert run(tiny_server, corpus / f"{n}.jsonl", tmp_path / "alone.parquet", "--overwrite") == 0
        assert (out / f"{n}.parquet").read_bytes() == (tmp_path / "alone.parquet").read_bytes()
    assert pq.read_table(out).num_rows == 270, "readers pass over what else lies there"
    capsys.readouterr()
    assert run(tiny_server, f"{corpus}/*.jsonl", out) == 0
    assert capsys.readouterr().out.count("was done before") == 4


def test_a_file_that_fails_does_not_stop_the_others(
    tiny_server: Server, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (corpus / "0.jsonl").write_bytes("in UTF-16".encode("utf-16"))
    (corpus / "unreadable.jsonl").symlink_to("/proc/self/mem")  # It can be opened, also by root.
    with (corpus / "1.jsonl").open("a") as file:
        file.write("no JSON\n")
    assert run(tiny_server, corpus, out) == 1
    err = capsys.readouterr().err
    assert "0.jsonl is UTF-16" in err and "unreadable.jsonl: Input/output error" in err
    assert "2 of 5 files failed" in err
    (corpus / "unreadable.jsonl").unlink()
    assert sorted(path.name for path in out.iterdir()) == ["1.parquet", "2.parquet", "_layertap"]
    side = out / "_layertap" / "1.parquet.errors.jsonl"
    assert json.loads(side.read_text())["number"] == 91
    (corpus / "0.jsonl").write_text(json.dumps({"id": "one", "text": "hello"}) + "\n")
    assert run(tiny_server, corpus, out) == 3, "the bad item of another file is still one"
    shown = capsys.readouterr()
    assert shown.out.count("was done before") == 3
    assert f"1 item failed; {side} has the reasons\n" in shown.err, "none follows"
    assert pq.read_table(out).num_rows == 181


def test_a_finished_file_of_another_model_or_setting_is_not_taken_for_this_one(
    tiny_server: Server, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(tiny_server, corpus, out) == 0
    assert run(tiny_server, corpus, out, "--normalize") == 1
    assert "4 of 4 files failed" in capsys.readouterr().err
    assert run(tiny_server, corpus, out, "--normalize", "--overwrite") == 0
    assert "was done before" not in capsys.readouterr().out
    assert run(tiny_server, corpus, out, "--normalize") == 0


def test_ranges_of_one_file_are_not_used_for_a_corpus(
    tiny_server: Server, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["encode", str(corpus), "-o", str(tmp_path / "out"), "--target", tiny_server.address]
    assert main([*given, "--precision", "int8"]) == 2
    assert "ranges of one file" in capsys.readouterr().err
