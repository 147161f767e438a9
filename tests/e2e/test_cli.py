"""The command `layertap` as a shell sees it: what it prints where, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support import Server

from layertap import Client
from layertap.cli import main

COMMANDS = ["tokenize", "decode", "embed", "encode", "info", "health"]
WAIT_S = 60.0

HEEDING_CTRL_C = ("env", "--default-signal=INT")
"""Tests that run in the background of a shell would pass on that Ctrl-C is ignored."""


@pytest.fixture
def target(tiny_server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiny server, named by the environment."""
    monkeypatch.setenv("LAYERTAP_TARGET", tiny_server.address)
    return tiny_server.address


def start(*arguments: str) -> subprocess.Popen[str]:
    """Starts the command in a process of its own."""
    return subprocess.Popen(
        [*HEEDING_CTRL_C, sys.executable, "-m", "layertap", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def finish(process: subprocess.Popen[str], stdin: str | None = None) -> tuple[int, str, str]:
    """Waits for its end; returns its exit code and what it printed."""
    with process:
        out, err = process.communicate(stdin, timeout=WAIT_S)
    return process.returncode, out, err


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_tokenize_shows_a_token_a_line(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenize", "I love Paris", "--pad-to", "7"]) == 0
    head, *rows = lines(capsys)
    assert head.split() == ["id", "mask", "type", "word", "offsets", "token"]
    assert rows[3].split() == ["3000", "1", "0", "2", "7:12", "paris"] and len(rows) == 7
    assert main(["tokenize", "I love Paris", "Hello", "--json", "--no-special-tokens"]) == 0
    first, second = map(json.loads, lines(capsys))
    assert (first["index"], first["tokens"], first["input_ids"]) == (0, ["i", "love", "paris"], [1045, 2293, 3000])
    assert (second["index"], second["tokens"], second["truncated"]) == (1, ["hello"], False)


def test_decode_reads_ids(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decode", "101", "1045", "2293", "3000", "102"]) == 0
    assert lines(capsys) == ["i love paris"]
    code, out, err = finish(start("decode", "--json", "--keep-special-tokens"), "101,1045,102\n7592\n")
    assert (code, err) == (0, "")
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["[CLS] i [SEP]", "hello"]


def test_embed_shows_what_the_client_gets(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--layers", "-4,-1", "--pooler-output", "--pooling", "mean", "--pooling", "cls", "--normalize"]
    assert main(["embed", "I love Paris", "Hello", "--json", *flags, "--dimensions", "8"]) == 0
    first, second = map(json.loads, lines(capsys))
    assert list(first) == [
        *("index", "id", "token_count", "truncated"),
        *("layer_0", "layer_3", "pool_0", "pool_1", "pooler_output"),
    ]
    assert (first["index"], first["id"], first["token_count"], second["index"]) == (0, 1, 5, 1)
    with Client(target) as client:
        wanted = client.embed("I love Paris", layers=[0, -1], pooler_output=True)
    np.testing.assert_allclose(first["layer_3"], wanted.ragged(-1)[0], atol=2e-5)
    np.testing.assert_allclose(first["pooler_output"], wanted.pooler_output[0], atol=2e-5)
    assert np.shape(first["pool_0"]) == (8,) and abs(np.linalg.norm(first["pool_1"]) - 1) < 1e-5
    assert main(["embed", "I love Paris", "--pooling", "mean"]) == 0
    head, row = lines(capsys)
    assert head == "text 1: 5 tokens" and row.split()[:2] == ["pool_0", "(32,)"]
    assert main(["embed", "I love Paris", "--pooling", "mean", "--layers", "-1,-2", "--dimensions", "3"]) == 0
    _, *layers, row = lines(capsys)
    assert [one.split()[0] for one in layers] == ["layer_2", "layer_3"] and layers[0].endswith("…")
    assert row.index("(3,)") == layers[0].index("(5, 32)") and len(row.split()) == 5


@pytest.mark.parametrize("command", ["tokenize", "embed"])
def test_texts_come_from_arguments_files_and_stdin(
    command: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "one", "", "three", "--json"]) == 0
    wanted = capsys.readouterr().out
    (tmp_path / "a.txt").write_text("one\n\nthree\n")
    assert main([command, str(tmp_path / "a.txt"), "--json"]) == 0
    assert capsys.readouterr().out == wanted
    rows = "".join(json.dumps({"body": text}) + "\n" for text in ("one", "", "three"))
    (tmp_path / "a.log").write_text(rows)
    reading = ["--json", "--text-field", "body", "--input-format", "jsonl"]
    assert main([command, str(tmp_path / "a.log"), *reading]) == 0
    assert capsys.readouterr().out == wanted
    assert finish(start(command, "--json"), "one\n\nthree") == (0, wanted, "")
    assert finish(start(command, "-", *reading), rows) == (0, wanted, "")


def test_a_bad_text_is_reported_and_the_others_go_on(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", "one", "private " * 600, "three", "--pooling", "mean"]) == 3
    found = capsys.readouterr()
    assert [line for line in found.out.splitlines() if line[0] != " "] == ["text 1: 3 tokens", "text 3: 3 tokens"]
    assert found.err.startswith("layertap: item 2: has 602 tokens, max_length is 512")
    assert found.err.count("\n") == 1 and "private" not in found.err


def test_info_and_health_tell_about_the_server(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health"]) == 0 and lines(capsys) == ["SERVING"]
    assert main(["health", "--json"]) == 0 and json.loads(capsys.readouterr().out) == {"status": "SERVING"}
    assert main(["info"]) == 0
    shown = dict(line.split(maxsplit=1) for line in lines(capsys))
    assert (shown["layer_count"], shown["hidden_size"], shown["limits.max_text_count"]) == ("3", "32", "1000")
    assert shown["batch_invariant"] in ("True", "False") and shown["padding_side"] == "right"
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["limits"]["max_text_count"] == 1000


@pytest.mark.parametrize("command", COMMANDS)
def test_without_a_server_it_says_so_in_one_line_and_ends_with_1(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"tokenize": ["x"], "decode": ["1"], "embed": ["x"], "encode": ["x"]}.get(command, [])
    assert main([command, *given, "--target", "127.0.0.1:1", "--timeout-s", "5"]) == 1
    found = capsys.readouterr()
    assert not found.out and found.err.startswith("layertap: ") and found.err.count("\n") == 1
    assert "127.0.0.1:1" in found.err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["embed", "nowhere.txt"], "there is no file nowhere.txt"),
        (["embed", "a.txt", "b"], "pass one file"),
        (["embed", "x", "--shard", "0/2"], "need files as input"),
        (["embed", "-", "--input-format", "parquet"], "name the file"),
        (["embed", "x", "--normalize"], "choose one with --pooling"),
        (["embed", "x", "-o", "out.csv"], "use .npz, .npy, .safetensors, .parquet or .arrow"),
        (["decode", "x"], "no token id"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_what_to_do(
    arguments: list[str], reason: str, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    found = capsys.readouterr()
    assert not found.out and reason in found.err and found.err.count("\n") == 1


@pytest.mark.parametrize("command", ["tokenize", "decode", "embed"])
def test_nothing_at_all_is_wrong_usage(command: str, target: str) -> None:
    code, out, err = finish(start(command), "")
    assert (code, out) == (2, "") and err.startswith("layertap: there ")


@pytest.mark.parametrize("arguments", [[], ["embed", "--layers", "x"], ["embed", "--part-texts", "0"], ["nonsense"]])
def test_flags_that_cannot_be_parsed_end_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    found = capsys.readouterr().err
    assert caught.value.code == 2 and found.startswith("usage: layertap") and found.count("\n") == 2


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path) -> None:
    code = "import sys; sys.modules['pyarrow'] = None; from layertap.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["embed", "x", "-o", str(tmp_path / "out.parquet")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 2 and "pip install 'layertap[arrow]'" in done.stderr and done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


# Help.


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_has_examples_that_parse(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from layertap.cli import arguments as parser

    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    examples = re.findall(r"layertap ((?:\w+).*?)(?: <.*| \|\|.*| && .*)?$", text.partition("example")[2], re.MULTILINE)
    assert examples
    for example in examples:
        arguments = [one.strip("'") for one in re.findall(r"'[^']*'|\S+", example)]
        if "--help" not in arguments:
            parser.build().parse_args(arguments)


def test_help_tells_every_command_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {name}" in text for name in COMMANDS)
    assert re.findall(r"^  (\d+) ", text.partition("exit codes:")[2], re.MULTILINE) == [
        "0",
        "1",
        "2",
        "3",
        "130",
        "141",
    ]


# Readers who leave, and Ctrl-C.


@contextlib.contextmanager
def endless(target: str) -> Iterator[subprocess.Popen[str]]:
    """Embeds lines that never end."""
    source = subprocess.Popen(["yes", "I love Paris"], stdout=subprocess.PIPE)
    with (
        source,
        subprocess.Popen(
            [*HEEDING_CTRL_C, sys.executable, "-m", "layertap", "embed", "--pooling", "mean", "--target", target],
            stdin=source.stdout,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            source.kill()
            process.kill()


def test_a_reader_who_leaves_is_no_error(tiny_server: Server) -> None:
    with endless(tiny_server.address) as process:
        assert process.stdout and process.stdout.readline() == "text 1: 5 tokens\n"
        process.stdout.close()
        assert process.wait(WAIT_S) == 141
        assert process.stderr and process.stderr.read() == ""


def test_ctrl_c_ends_it_quietly(tiny_server: Server) -> None:
    with endless(tiny_server.address) as process:
        assert process.stdout and process.stdout.readline() == "text 1: 5 tokens\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=WAIT_S)
        assert (process.returncode, err) == (130, "")


def test_ctrl_c_ends_it_while_it_waits_for_stdin(tiny_server: Server) -> None:
    with start("embed", "--pooling", "mean", "--target", tiny_server.address) as process:
        assert process.stdin and process.stdout
        process.stdin.write("one\n")
        process.stdin.flush()
        assert process.stdout.readline() == "text 1: 3 tokens\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 130
        assert process.stderr and process.stderr.read() == ""
