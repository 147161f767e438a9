"""`layertap embed` on files: what comes out, what is refused, and that nothing is lost whenever it is broken off."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file
from support import Server, running

from layertap import Client, LayerMix, Pooling
from layertap.cli import main
from layertap.jobs import atomic_files
from layertap.jobs.parts import Parts

WAIT_S = 60.0
PART = 50

HEEDING_CTRL_C = ("env", "--default-signal=INT")
"""Tests that run in the background of a shell would pass on that Ctrl-C is ignored."""

LAYERS = ("--layers", "0,-1", "--pooler-output", "--pooling", "mean")
POOLED = ("--pooling", "mean", "--normalize")


@pytest.fixture(scope="module")
def server(tiny_server: Server, tiny_folder: Path) -> Iterator[Server]:
    """A server whose numbers do not depend on what is computed beside a text."""
    with Client(tiny_server.address) as client:
        if client.model_info().batch_invariant:
            yield tiny_server
            return
    with running("--device", "cpu", "--model-id", str(tiny_folder), "--max-batch-tokens", "1") as found:
        yield found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1000 lines of JSON, of which five are bad, each in another way."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    chosen = random.Random(7)
    lines = [
        json.dumps({"id": f"text {n}", "text": " ".join(chosen.choices(["paris", "love", "hello", "é"], k=n % 9))})
        for n in range(1000)
    ]
    lines[17] = json.dumps({"id": "long", "text": "word " * 600})
    lines[333] = "no JSON"
    lines[334] = json.dumps({"id": "without"})
    lines[700] = json.dumps({"id": 1.5, "text": "x"})
    lines[999] = json.dumps({"id": "surrogate", "text": "\ud800"})
    path.write_text("\n".join(lines) + "\n")
    return path


class Run:
    """The command in a process of its own."""

    def __init__(self, server: Server, corpus: Path, output: Path, *flags: str) -> None:
        self.folder = output.with_name(output.name + ".parts")
        arguments = [str(corpus), "--id-field", "id", "-o", str(output), "--part-texts", str(PART), *flags]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "layertap", "embed", "--target", server.address, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def until(self, happened: Callable[[], bool]) -> bool:
        """Waits until something has happened, or the process has ended; returns whether it still runs."""
        deadline = time.monotonic() + WAIT_S
        while self.process.poll() is None and not happened():
            assert time.monotonic() < deadline, "it never came about"
            time.sleep(0.001)
        return self.process.poll() is None

    def part_count(self) -> int:
        with contextlib.suppress(FileNotFoundError):  # The command removes the folder at its end.
            return sum(re.fullmatch(r"part-\d{8}", name) is not None for name in os.listdir(self.folder))
        return 0

    def finish(self) -> tuple[int, str]:
        with self.process:
            _, err = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, err


def run(server: Server, corpus: Path, output: Path, *flags: str) -> int:
    """The command, in this process."""
    own = ["--target", server.address, "--id-field", "id", "--part-texts", str(PART)]
    return main(["embed", str(corpus), "-o", str(output), *own, *flags])


def made(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def unbroken(
    server: Server, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, tuple[str, ...]], dict[str, bytes]]:
    """Returns what unbroken runs make, each made once."""
    known: dict[Any, dict[str, bytes]] = {}

    def get(name: str, flags: tuple[str, ...]) -> dict[str, bytes]:
        if (name, flags) not in known:
            folder = tmp_path_factory.mktemp("unbroken")
            assert run(server, corpus, folder / name, *flags) == 3
            known[name, flags] = made(folder)
        return known[name, flags]

    return get


# What comes out.


def test_a_file_has_what_the_client_gets(server: Server, corpus: Path, tmp_path: Path) -> None:
    assert run(server, corpus, tmp_path / "out.npz", *LAYERS) == 3
    assert sorted(os.listdir(tmp_path)) == ["out.npz", "out.npz.errors.jsonl"]
    good = [
        (fields["id"], fields["text"])
        for n, line in enumerate(corpus.read_text().splitlines())
        if n not in (17, 333, 334, 700, 999)
        for fields in [json.loads(line)]
    ]
    with np.load(tmp_path / "out.npz") as found, Client(server.address) as client:
        assert found["ids"].tolist() == [one for one, _ in good]
        wanted = client.embed([text for _, text in good], layers=[0, -1], pooler_output=True, pooling="mean")
        assert np.array_equal(found["token_counts"], wanted.token_counts) and not found["truncated"].any()
        for name, array in (
            ("layer_0", np.concatenate(wanted.ragged(0))),
            ("layer_3", np.concatenate(wanted.ragged(3))),
            ("pool_0", wanted.pooled),
            ("pooler_output", wanted.pooler_output),
        ):
            np.testing.assert_allclose(found[name], array, atol=2e-5, err_msg=name)


def test_bad_items_are_reported_with_number_id_code_and_reason(
    unbroken: Callable[[str, tuple[str, ...]], dict[str, bytes]],
) -> None:
    found = [json.loads(line) for line in unbroken("out.npz", LAYERS)["out.npz.errors.jsonl"].splitlines()]
    assert [(one["number"], one["id"], one["code"]) for one in found] == [
        (18, "long", "INVALID_ARGUMENT"),
        (334, None, "INVALID_ARGUMENT"),
        (335, "without", "INVALID_ARGUMENT"),
        (701, None, "INVALID_ARGUMENT"),
        (1000, "surrogate", "INVALID_ARGUMENT"),
    ]
    assert found[0]["reason"].startswith("has 602 tokens, max_length is 512")


@pytest.mark.parametrize("name", ["out.npy", "out.safetensors", "out.parquet", "out.arrow"])
def test_every_format_has_the_same_numbers(
    name: str, unbroken: Callable[[str, tuple[str, ...]], dict[str, bytes]], tmp_path: Path
) -> None:
    for one in (name, "out.npz"):
        (tmp_path / one).write_bytes(unbroken(one, POOLED)[one])
    with np.load(tmp_path / "out.npz") as wanted:
        ids, vectors = wanted["ids"].tolist(), wanted["pool_0"]
    path = tmp_path / name
    if path.suffix == ".npy":
        found = np.load(path)
    elif path.suffix == ".safetensors":
        arrays = load_file(path)
        found, data, ends = arrays["pool_0"], arrays["ids_utf8"].tobytes(), arrays["ids_ends"].tolist()
        assert [data[a:b].decode() for a, b in zip([0, *ends], ends, strict=False)] == ids
    else:
        table = pq.read_table(path) if path.suffix == ".parquet" else pa.ipc.open_file(path.read_bytes()).read_all()
        assert table["ids"].to_pylist() == ids
        found = np.array(table["pool_0"].to_pylist(), np.float32)
    assert np.array_equal(found, vectors)


def test_parquet_in_gives_the_same_as_jsonl_in(server: Server, tmp_path: Path) -> None:
    rows = [{"id": n, "text": ["some", "words"] if n % 2 else ["more", "of", "them"]} for n in range(120)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("parquet", "jsonl"):
        assert run(server, tmp_path / f"a.{name}", tmp_path / f"{name}.npz", *POOLED) == 0
    assert (tmp_path / "parquet.npz").read_bytes() == (tmp_path / "jsonl.npz").read_bytes()


def test_words_and_mixes_are_divided_by_their_counts(server: Server, tmp_path: Path) -> None:
    texts = [["some", "", "words"], "Tokenization, I love it", ""]
    corpus = tmp_path / "a.jsonl"
    corpus.write_text("".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)))
    flags = ("--words", "mean", "--layers", "-1", "--mix", "concat:0,-1", "--pooling", "cls")
    flags += ("--pooling-layer", "weighted:0,3:0.5,2")
    with Client(server.address) as client:
        mix, weighted = LayerMix("concat", layers=[0, -1]), LayerMix("weighted", layers=[0, 3], weights=[0.5, 2])
        wanted = client.embed(texts, words="mean", layers=[-1], mix=mix, pooling=Pooling("cls", layer=weighted))
    for name in ("out.npz", "out.arrow"):
        assert run(server, corpus, tmp_path / name, *flags) == 0
    with np.load(tmp_path / "out.npz") as found:
        assert found["word_counts"].tolist() == [3, 5, 0]
        np.testing.assert_allclose(found["words_layer_3"], np.concatenate(wanted.words.ragged(-1)), atol=2e-5)
        np.testing.assert_allclose(found["words_mixed"], np.concatenate(wanted.words.mixed.ragged()), atol=2e-5)
        np.testing.assert_allclose(found["pool_0"], wanted.pooled, atol=2e-5)
        assert found["word_offsets"].tolist() == np.concatenate(wanted.words.offsets).tolist()
        rows = pa.ipc.open_file((tmp_path / "out.arrow").read_bytes()).read_all()["words_layer_3"].to_pylist()
        assert [len(one) for one in rows] == [3, 5, 0]
        assert np.array_equal(np.array(rows[1], np.float32), found["words_layer_3"][3:])


def test_a_job_with_no_good_item_writes_no_file(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "bad.jsonl"
    corpus.write_text("{}\n{}\n")
    assert run(server, corpus, tmp_path / "out.npz", *POOLED) == 1
    assert "there is no good item" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["bad.jsonl", "out.npz.errors.jsonl"]


def test_an_answer_in_json(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "a.jsonl"
    corpus.write_text('{"id": 1, "text": "x"}\n')
    assert run(server, corpus, tmp_path / "out.npy", *POOLED, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "path": str(tmp_path / "out.npy"),
        "text_count": 1,
        "bad_count": 0,
        "errors": None,
        "shapes": {"pool_0": [1, 32]},
    }


# What is refused.


@pytest.fixture
def broken(server: Server, corpus: Path, tmp_path: Path) -> Path:
    """An output of which a few parts are done."""
    one = Run(server, corpus, tmp_path / "out.npz", *LAYERS)
    assert one.until(lambda: one.part_count() >= 3)
    one.process.kill()
    assert one.finish()[0] == -signal.SIGKILL
    return tmp_path / "out.npz"


def test_what_is_there_is_not_overwritten(
    server: Server, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, why in (("out.npz", "is there already"), ("out.npz.errors.jsonl", "was not made by this command")):
        (tmp_path / name).write_bytes(b"mine")
        assert run(server, corpus, tmp_path / "out.npz", *POOLED) == 2
        assert f"{name} {why}" in capsys.readouterr().err
        assert made(tmp_path) == {name: b"mine"} and len(os.listdir(tmp_path)) == 1
        (tmp_path / name).unlink()
    (tmp_path / "out.npz").write_bytes(b"mine")
    assert run(server, corpus, tmp_path / "out.npz", *POOLED, "--overwrite") == 3
    with np.load(tmp_path / "out.npz") as found:
        assert len(found["ids"]) == 995


def test_a_job_is_not_taken_up_with_other_settings_or_items(
    server: Server, corpus: Path, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = made(broken.with_name("out.npz.parts"))
    changed = tmp_path / "changed.jsonl"
    changed.write_text(corpus.read_text().replace('"text 3"', '"text III"'))
    for source, flags, reason in (
        (corpus, POOLED, "was begun with layers [0, -1], now it is None"),
        (corpus, (*LAYERS, "--max-length", "9"), "was begun with max_length None, now it is 9"),
        (corpus, (*LAYERS, "--part-texts", "51"), "was begun with part_items 50, now it is 51"),
        (changed, LAYERS, "the input has changed where it was done already"),
    ):
        assert run(server, source, broken, *flags) == 2
        err = capsys.readouterr().err
        assert reason in err and "--overwrite" in err and err.count("\n") == 1
        assert made(broken.with_name("out.npz.parts")) == before
    assert run(server, changed, broken, *LAYERS, "--overwrite") == 3
    with np.load(broken) as found:
        assert found["ids"][3] == "text III" and len(found["ids"]) == 995
    assert not broken.with_name("out.npz.parts").exists()


def test_a_job_is_not_taken_up_with_another_model(
    real_server: Server, corpus: Path, broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(real_server, corpus, broken, *LAYERS) == 2
    assert "fingerprint" in capsys.readouterr().err


def test_two_are_never_at_work_on_one_output(
    server: Server, corpus: Path, broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with atomic_files.locked(Parts.lock(broken.with_name("out.npz.parts"))):
        assert run(server, corpus, broken, *LAYERS) == 2
    assert "another process works" in capsys.readouterr().err


def test_what_cannot_begin_leaves_nothing(server: Server, corpus: Path, tmp_path: Path) -> None:
    for flags, code in ((("--layers", "9"), 1), (("--pooling", "mean", "--pooling", "cls"), 2)):
        assert run(server, corpus, tmp_path / "out.npy", *flags) == code
        assert os.listdir(tmp_path) == []


def test_more_items_at_the_end_of_the_input_are_taken_up(
    server: Server, corpus: Path, broken: Path, tmp_path: Path
) -> None:
    longer = tmp_path / "longer.jsonl"
    longer.write_text(corpus.read_text() + '{"id": "more", "text": "x"}\n')
    assert run(server, longer, broken, *LAYERS) == 3
    with np.load(broken) as found:
        assert len(found["ids"]) == 996 and found["ids"][-1] == "more"


# Broken off.


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "flags"), [("out.npz", LAYERS), ("out.parquet", POOLED)])
def test_killed_at_ten_random_moments_it_makes_the_same_file(
    name: str,
    flags: tuple[str, ...],
    server: Server,
    corpus: Path,
    tmp_path: Path,
    unbroken: Callable[[str, tuple[str, ...]], dict[str, bytes]],
) -> None:
    chosen = random.Random(name)
    output, folder = tmp_path / name, tmp_path / f"{name}.parts"
    kills = 0
    while kills < 10:
        one = Run(server, corpus, output, *flags)
        # A random moment after the next parts, which may be in the middle of one, or when the file is put together.
        wanted, later_s = one.part_count() + chosen.randrange(5), chosen.uniform(0, 0.05)
        one.until(lambda: one.part_count() >= wanted)  # noqa: B023  # Called within the round.
        moment = time.monotonic() + later_s
        one.until(lambda: time.monotonic() >= moment)  # noqa: B023  # As above.
        one.process.kill()
        kills += one.finish()[0] == -signal.SIGKILL
        if output.exists() and not folder.exists():  # It was done: begin anew.
            assert made(tmp_path) == unbroken(name, flags)
            for path in tmp_path.iterdir():
                path.unlink()
    assert Run(server, corpus, output, *flags).finish()[0] == 3
    assert made(tmp_path) == unbroken(name, flags)
    assert not folder.exists()


class Died(BaseException):
    """Stands for the end of the process."""


class Death:
    """Ends the work at the n-th change of the file system: before it is made, or right after."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = -1
        self.after = False
        for name in ("mkdir", "fsync", "replace", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self._wrapped(getattr(os, name)))

    def _wrapped(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0 and not self.after:
                raise Died
            try:
                return change(*args, **kwargs)
            finally:
                if self.left == 0:
                    raise Died

        return call


@pytest.mark.heavy
@pytest.mark.parametrize("after", [False, True])
def test_dead_at_any_step_of_the_end_it_makes_the_same_file(
    after: bool, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"id": n, "text": "x" if n % 40 else None}) + "\n" for n in range(110)))
    whole = tmp_path / "whole"
    whole.mkdir()
    assert run(server, corpus, whole / "out.npz", *POOLED) == 3
    death = Death(monkeypatch)
    for step in range(1, 1000):
        folder = tmp_path / f"step {step}"
        folder.mkdir()
        death.left, death.after = step, after
        try:
            assert run(server, corpus, folder / "out.npz", *POOLED) == 3
            break
        except Died:
            death.left = -1
        finished = (folder / "out.npz").exists() and not (folder / "out.npz.parts/layertap-job.json").exists()
        assert run(server, corpus, folder / "out.npz", *POOLED) == (2 if finished else 3), f"step {step}"
        assert made(folder) == made(whole) and len(os.listdir(folder)) == 2, f"step {step}"
        shutil.rmtree(folder)
    death.left = -1
    assert step > 20


class Held:
    """A job whose input comes by stdin and stops half-way, so that it cannot end by itself."""

    def __init__(self, server: Server, output: Path, *flags: str) -> None:
        self.texts = "".join(f"text {n}\n" for n in range(400))
        own = ["--target", server.address, "-o", str(output), "--part-texts", "50", *POOLED, *flags]
        self.command = [*HEEDING_CTRL_C, sys.executable, "-m", "layertap", "embed", *own]
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdin
        self.process.stdin.write(self.texts[: len(self.texts) // 2])
        self.process.stdin.flush()
        folder, deadline = output.with_name(output.name + ".parts"), time.monotonic() + WAIT_S
        while not folder.is_dir() or sum(1 for _ in folder.glob("part-????????")) < 2:
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.001)

    def end(self) -> tuple[int, str]:
        with self.process:
            assert self.process.stderr
            return self.process.wait(WAIT_S), self.process.stderr.read()

    def again(self, server: Server) -> int:
        """The same command with the whole input."""
        command = [*self.command, "--target", server.address]
        return subprocess.run(command, input=self.texts, text=True, capture_output=True, timeout=WAIT_S).returncode


def check_held(output: Path) -> None:
    with np.load(output) as found:
        assert found["ids"].tolist() == list(range(1, 401)) and found["pool_0"].shape == (400, 32)
    assert os.listdir(output.parent) == [output.name]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_job_on_stdin_is_taken_up_after_a_signal(number: signal.Signals, server: Server, tmp_path: Path) -> None:
    job = Held(server, tmp_path / "out.npz")
    job.process.send_signal(number)
    code, err = job.end()
    if number == signal.SIGINT:
        assert code == 130 and err.count("\n") == 1, err
        done = Parts(tmp_path / "out.npz.parts").item_count
        assert f"{done} finished items in" in err and done >= 100
    assert job.again(server) == 0
    check_held(tmp_path / "out.npz")


def test_a_lost_server_ends_it_and_the_same_command_goes_on_with_the_next(
    tiny_folder: Path, server: Server, tmp_path: Path
) -> None:
    lost = Server("--device", "cpu", "--model-id", str(tiny_folder))
    job = Held(lost, tmp_path / "out.npz", "--timeout-s", "1")
    lost.kill()
    code, err = job.end()
    assert code == 1 and "finished items in" in err and "no server answers" in err, err
    assert job.again(server) == 0
    check_held(tmp_path / "out.npz")


# Memory.


def test_memory_stays_bounded(tiny_server: Server, tmp_path: Path) -> None:
    corpus, output = tmp_path / "corpus.txt", tmp_path / "out.parquet"
    corpus.write_text("".join(f"short text {n}\n" for n in range(20_000)))
    code = (
        "import re, sys; from layertap.cli import main; code = main(sys.argv[1:]); "
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]); sys.exit(code)"
    )
    arguments = ["embed", str(corpus), "-o", str(output), "--target", tiny_server.address, *POOLED]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert pq.read_metadata(output).num_rows == 20_000
    peak_mb = int(done.stdout.split()[-1]) / 1024
    assert peak_mb < 300, f"{peak_mb:.0f} MB"
