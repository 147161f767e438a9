"""`layertap encode`, closed streams, wrong targets: the command line against a running server."""

from __future__ import annotations

import gzip
import json
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from support import Server

from layertap import Client
from layertap.cli import main

TEXTS = ["I love Paris", "Hello", "a long text " * 300, "tokenization is fun"]
WAIT_S = 60.0


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl.gz"
    lines = "".join(json.dumps({"id": n, "text": text, "title": f"<{n}>"}) + "\n" for n, text in enumerate(TEXTS))
    path.write_bytes(gzip.compress(lines.encode()))
    return path


@pytest.mark.parametrize("precision", ["float32", "int8", "ubinary"])
def test_encode_gives_what_the_client_gives(
    precision: str, real_server: Server, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--target", real_server.address, "--precision", precision, "--truncate-dim", "64", "--normalize"]
    with Client(real_server.address) as client:
        wanted = client.encode(TEXTS, precision=precision, truncate_dim=64, normalize_embeddings=True)  # type: ignore[arg-type]
    output = tmp_path / "out.npz"
    assert main(["encode", str(corpus), "--id-field", "id", "--keep", "title", "-o", str(output), *flags]) == 0
    capsys.readouterr()
    with np.load(output) as found:
        assert found["ids"].tolist() == [0, 1, 2, 3] and found["title"].tolist() == ["<0>", "<1>", "<2>", "<3>"]
        assert found["truncated"].tolist() == [False, False, True, False]
        _close(found["sentence_embedding"], wanted)
    assert main(["encode", *TEXTS, "--json", *flags]) == 0
    rows = [json.loads(line)["sentence_embedding"] for line in capsys.readouterr().out.splitlines()]
    _close(np.array(rows).astype(wanted.dtype), wanted)


def _close(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    if wanted.dtype == np.float32:
        np.testing.assert_allclose(found, wanted, atol=2e-5)
    else:  # A value may lie on the border of two steps.
        assert np.mean(found != wanted) < 0.02


def test_encode_gives_token_embeddings(real_server: Server, tmp_path: Path) -> None:
    output = tmp_path / "out.npz"
    flags = ["--target", real_server.address, "--output-value", "token_embeddings", "-o", str(output)]
    assert main(["encode", *TEXTS[:2], *flags]) == 0
    with Client(real_server.address) as client, np.load(output) as found:
        wanted = client.encode(TEXTS[:2], output_value="token_embeddings")
        assert found["token_counts"].tolist() == [len(one) for one in wanted]
        np.testing.assert_allclose(found["token_embeddings"], np.concatenate(list(wanted)), atol=2e-5)


@pytest.mark.parametrize("command", [["health"], ["embed", "x"], ["info"]])
def test_a_target_that_cannot_be_one_is_wrong_usage(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--target", "one:1,two:2", "--timeout-s", "2"]) == 2
    err = capsys.readouterr().err
    assert "pass IP addresses with ports" in err and "no server answers" not in err


def test_a_missing_folder_is_named(tiny_server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "missing" / "out.npz"
    assert main(["embed", "x", "--pooling", "mean", "-o", str(output), "--target", tiny_server.address]) == 2
    assert f"there is no folder {output.parent}; create it" in capsys.readouterr().err


def shell(line: str, *arguments: str) -> tuple[int, str]:
    """Runs a line of shell in which "$@" is the command; returns its exit code and stderr."""
    command = ["bash", "-c", line, "bash", sys.executable, "-m", "layertap", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    return done.returncode, done.stderr


@pytest.mark.parametrize("closed", [">&-", "> /dev/full", ">&- 2>&-", "<&- >&- 2>&-"])
def test_the_exit_code_of_health_is_true_whatever_is_closed(closed: str, tiny_server: Server) -> None:
    assert shell(f'"$@" {closed}', "health", "--target", tiny_server.address) == (0, "")
    code, _ = shell(f'"$@" {closed}', "health", "--target", "127.0.0.1:1", "--timeout-s", "2")
    assert code == 1


@pytest.mark.parametrize("closed", [">&-", "> /dev/full"])
def test_an_answer_that_cannot_be_printed_is_an_error_and_a_file_is_not(
    closed: str, tiny_server: Server, tmp_path: Path
) -> None:
    code, err = shell(f'"$@" {closed}', "embed", "x", "--pooling", "mean", "--target", tiny_server.address)
    assert code == 1 and err.startswith("layertap: ") and err.count("\n") == 1
    output = tmp_path / "out.npy"
    written = ["-o", str(output), "--pooling", "mean", "--target", tiny_server.address]
    assert shell(f'"$@" {closed}', "embed", "x", *written) == (0, "") and np.load(output).shape == (1, 32)


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "layertap", "--version"], capture_output=True, text=True, timeout=WAIT_S
    )
    assert done.returncode == 0 and done.stdout.startswith("layertap ")


def test_grpc_says_nothing_of_its_own_where_a_server_stops() -> None:
    settings = bytes(3) + b"\4\0" + bytes(4)
    goaway = b"\0\0\x08\7\0" + bytes(4) + struct.pack(">II", 0, 2)  # No call was taken; an internal error.

    def stop_at_once(listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                connection.recv(1 << 16)
                connection.sendall(settings + goaway)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=stop_at_once, args=(listening,))
        thread.start()
        target = f"127.0.0.1:{listening.getsockname()[1]}"
        command = [sys.executable, "-m", "layertap", "health", "--timeout-s", "2", "--target", target]
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(WAIT_S)
    assert done.returncode == 1 and done.stdout == ""
    assert all(line.startswith("layertap: ") for line in done.stderr.splitlines()), done.stderr
