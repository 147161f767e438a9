"""Which files a corpus consists of, what they become, and which of them fall to one process."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from layertap.cli import arguments, parsing
from layertap.jobs import JobError, shards


def parsed(*given: str | Path) -> argparse.Namespace:
    return arguments.build().parse_args(["embed", *map(str, given)])


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "more").mkdir(parents=True)
    for name in ("b.txt", "a.jsonl.gz", "c.v2.parquet", "_SUCCESS", ".b.txt.crc", "more/d.txt"):
        (folder / name).touch()
    return folder


def names(found: list[shards.Shard] | None) -> list[str]:
    assert found is not None
    return [f"{one.source.name} -> {one.output.name}" for one in found]


def test_each_file_of_a_folder_becomes_one_of_the_same_name(corpus: Path, tmp_path: Path) -> None:
    found = parsing.shards(parsed(corpus, "-o", tmp_path / "out"))
    assert names(found) == [
        "a.jsonl.gz -> a.parquet",
        "b.txt -> b.parquet",
        "c.v2.parquet -> c.v2.parquet",
    ]
    assert found is not None and found[0].destination(overwrite=False).work_folder == tmp_path / "out" / "_layertap"


def test_a_pattern_finds_files_in_folders_too(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = parsing.shards(parsed(f"{corpus}/**/*.txt", "-o", out, "--output-format", "npz"))
    assert names(found) == ["b.txt -> b.npz", "d.txt -> d.npz"]
    assert names(parsing.shards(parsed(corpus / "b.txt", corpus / "more/d.txt", "-o", out))) == [
        "b.txt -> b.parquet",
        "d.txt -> d.parquet",
    ]


def test_one_file_becomes_a_file_in_a_folder_that_is_there(corpus: Path, tmp_path: Path) -> None:
    assert parsing.shards(parsed(corpus / "b.txt", "-o", tmp_path / "out.npz")) is None
    (tmp_path / "out").mkdir()
    assert names(parsing.shards(parsed(corpus / "b.txt", "-o", tmp_path / "out"))) == ["b.txt -> b.parquet"]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_shares_of_all_processes_are_all_files_once(count: int, corpus: Path, tmp_path: Path) -> None:
    whole = names(parsing.shards(parsed(corpus, "-o", tmp_path / "out")))
    shares = [
        names(parsing.shards(parsed(corpus, "-o", tmp_path / "out", "--shard", f"{n}/{count}"))) for n in range(count)
    ]
    assert sorted(name for share in shares for name in share) == whole


@pytest.mark.parametrize("share", ["8/8", "1", "-1/2", "0/0", "a/b", "1/2/3"])
def test_a_share_that_is_none_is_refused(share: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("corpus/", f"--shard={share}")
    assert "0/8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "flags"),
    [(["I love Paris"], ["--shard", "0/2"]), (["--text", "a.txt"], ["--output-format", "npz"])],
)
def test_flags_of_several_files_are_refused_with_texts(given: list[str], flags: list[str], tmp_path: Path) -> None:
    with pytest.raises(parsing.UsageError, match="need files as input"):
        parsing.shards(parsed(*given, *flags, "-o", tmp_path / "out"))


def test_what_would_lose_files_is_refused(corpus: Path, tmp_path: Path) -> None:
    def refused(reason: str, *given: str | Path) -> None:
        with pytest.raises(JobError, match=reason):
            parsing.shards(parsed(*given))

    refused("there is no file .*missing", f"{corpus}/missing*.txt", "-o", tmp_path / "out")
    refused("where the outputs would be", corpus, "-o", corpus)
    (corpus / "b.csv").touch()
    refused("would both become", corpus, "-o", tmp_path / "out")
    with pytest.raises(JobError, match="names one file"):
        shards.prepare(tmp_path / "out.parquet")
    with pytest.raises(JobError, match="there is no folder"):
        shards.prepare(tmp_path / "missing" / "out")
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match="names one file"):
        shards.prepare(tmp_path / "file")
