"""What a job refuses before it computes anything, what it repairs by itself, and what it carries along."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from layertap.errors import InvalidArgumentError
from layertap.jobs import JobError
from layertap.jobs.destination import Destination
from layertap.jobs.items import Fields
from layertap.jobs.job import Job, Outcome
from layertap.jobs.part import LAYOUT
from layertap.jobs.parts import MANIFEST
from layertap.jobs.readers import Arguments, JsonLines
from layertap.jobs.tasks import EmbedTask, Task
from layertap.quantization import quantize_embeddings
from layertap.results.embedding import Embedding
from layertap.results.export import Column
from layertap.results.streamed import StreamResult
from layertap.types import LayerMix, ModelRef, Pooling, Timings, Windows

FINGERPRINT = "f" * 64


class Server:
    """Stands for a client: tells the model's name, and counts what it was asked for."""

    def __init__(self, *, lost_after: int = 10**9, fingerprint: str = FINGERPRINT) -> None:
        self.asked = 0
        self.fingerprint = fingerprint
        self.lost_after = lost_after

    def model_info(self, timeout_s: float) -> Any:
        return ModelRef(model_id="a-model", fingerprint=self.fingerprint)


class Lengths(Task):
    """A task: the vector of a text is its length, and that of nothing is an error."""

    settings = {"task": "lengths"}  # noqa: RUF012  # A property of other tasks.

    def __init__(self, precision: Any = "float32") -> None:
        self.precision = precision

    def stream(self, client: Server, contents: Iterable[Any], timeout_s: float) -> Iterator[StreamResult]:
        for index, text in enumerate(contents):
            if client.asked == client.lost_after:
                raise OSError("the disk is gone")
            client.asked += 1
            if not text:
                yield StreamResult(index=index, error=InvalidArgumentError("has no tokens"), _embedding=None)
            else:
                yield StreamResult(index=index, error=None, _embedding=embedding(text))

    def columns(self, found: Embedding) -> list[Column]:
        return [Column(name="token_counts", values=found.token_counts), Column(name="vector", values=found.pools[0])]


def embedding(text: str) -> Embedding:
    return Embedding(
        hidden_states=None,  # type: ignore[arg-type]  # None of its layers is asked for.
        pools=(np.array([[len(text), -len(text)]], np.float32),),
        token_counts=np.array([len(text)]),
        truncated=np.array([False]),
        window_counts=np.ones(1, np.int64),
        attention_mask=np.ones((1, 1), np.int64),
        model=ModelRef(model_id="a-model", fingerprint=FINGERPRINT),
        timings=Timings(queue_time_ns=0, tokenize_time_ns=0, compute_time_ns=0),
        _pooler_output=None,
        _tokens=None,
    )


def job(corpus: Path, output: Path, **options: Any) -> Job:
    fields = options.pop("fields", Fields())
    said = options.pop("said", [])
    task = options.pop("task", None) or Lengths()
    options = {"part_items": 10, "timeout_s": 1.0, "input_format": None, **options}
    source = JsonLines(path=corpus, fields=fields)
    files = {name: options.pop(name) for name in ("overwrite", "work_folder") if name in options}
    destination = Destination(output=output, **files)
    return Job(source=source, destination=destination, task=task, fields=fields, warn=said.append, **options)


def run(one: Job, server: Server | None = None) -> Outcome:
    return one.run(server or Server(), shown=False)  # type: ignore[arg-type]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "corpus.jsonl"
    path.parent.mkdir()
    lines = [{"text": "x" * (n % 7), "title": f"title {n}", "year": n if n % 5 else None} for n in range(45)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def half_done(corpus: Path, tmp_path: Path) -> Path:
    """An output of which two of five parts are done."""
    with pytest.raises(OSError, match="the disk is gone"):
        run(job(corpus, tmp_path / "out.npz"), Server(lost_after=25))
    assert sorted(path.name for path in (tmp_path / "out.npz.parts").glob("part-*")) == [
        "part-00000000",
        "part-00000001",
    ]
    return tmp_path / "out.npz"


def whole(corpus: Path, tmp_path: Path) -> bytes:
    run(job(corpus, tmp_path / "whole.npz"))
    return (tmp_path / "whole.npz").read_bytes()


# Refused before anything is computed.


def refused(one: Job, reason: str) -> None:
    server = Server()
    with pytest.raises(JobError, match=reason):
        run(one, server)
    assert server.asked == 0


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_path_that_is_something_else_is_refused_by_name(corpus: Path, tmp_path: Path, overwrite: bool) -> None:
    refused(job(corpus, tmp_path / "missing" / "out.npz", overwrite=overwrite), "there is no folder .*missing")
    (tmp_path / "folder.npz").mkdir()
    refused(job(corpus, tmp_path / "folder.npz", overwrite=overwrite), r"folder\.npz is a folder")
    os.link(corpus, tmp_path / "same.npz")
    refused(job(corpus, tmp_path / "same.npz", overwrite=overwrite), r"same\.npz is the input itself")
    (tmp_path / "out.npz.errors.jsonl").symlink_to(corpus)
    refused(job(corpus, tmp_path / "out.npz", overwrite=overwrite), "is the input itself")
    assert corpus.read_text().count("\n") == 45


def test_texts_that_are_no_file_may_replace_an_output(tmp_path: Path) -> None:
    output = tmp_path / "out.npz"
    output.touch()
    Destination(output=output, overwrite=True).check(Arguments(texts=["a"]))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("content", ["", "my notes\n", '{"number": 1}\n', "[" * 100_000, "\0" * 10, '"number"\n'])
def test_a_side_file_of_the_user_is_never_replaced(corpus: Path, tmp_path: Path, overwrite: bool, content: str) -> None:
    mine = tmp_path / "out.npz.errors.jsonl"
    mine.write_text(content)
    refused(job(corpus, tmp_path / "out.npz", overwrite=overwrite), "errors.jsonl was not made by this command")
    assert mine.read_text() == content
    mine.unlink()
    mine.symlink_to(tmp_path / "nowhere")
    refused(job(corpus, tmp_path / "out.npz", overwrite=overwrite), "errors.jsonl was not made by this command")
    assert mine.is_symlink()


def test_a_side_file_of_an_earlier_job_is_replaced(corpus: Path, tmp_path: Path) -> None:
    assert run(job(corpus, tmp_path / "out.npz")).bad_count == 7
    before = (tmp_path / "out.npz.errors.jsonl").read_bytes()
    assert run(job(corpus, tmp_path / "out.npz", overwrite=True)).bad_count == 7
    assert (tmp_path / "out.npz.errors.jsonl").read_bytes() == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_the_user_is_never_touched(corpus: Path, tmp_path: Path, overwrite: bool) -> None:
    mine = tmp_path / "out.npz.parts"
    mine.mkdir()
    for name in ("part-00000000", "manifest.json", "notes.tmp"):
        (mine / name).write_text("mine")
    before = sorted(os.listdir(mine))
    refused(job(corpus, tmp_path / "out.npz", overwrite=overwrite), "was not made by this command")
    assert sorted(os.listdir(mine)) == before
    (tmp_path / "link.npz.parts").symlink_to(mine)
    refused(job(corpus, tmp_path / "link.npz", overwrite=overwrite), "is not a folder of this command")
    (tmp_path / "file.npz.parts").write_text("mine")
    refused(job(corpus, tmp_path / "file.npz", overwrite=overwrite), "is not a folder of this command")


def test_files_of_the_user_among_the_parts_stay(corpus: Path, half_done: Path) -> None:
    folder = half_done.with_name("out.npz.parts")
    for name in ("part-notes.txt", "notes.tmp"):
        (folder / name).write_text("mine")
    run(job(corpus, half_done))
    assert sorted(os.listdir(folder)) == ["notes.tmp", "part-notes.txt"]


def test_two_outputs_with_one_stem_have_side_files_of_their_own(corpus: Path, tmp_path: Path) -> None:
    for name in ("out.npz", "out.parquet"):
        assert run(job(corpus, tmp_path / name)).bad_count == 7
    assert (tmp_path / "out.npz.errors.jsonl").read_bytes() == (tmp_path / "out.parquet.errors.jsonl").read_bytes()


# Repaired.


@pytest.mark.parametrize("name", ["part-00000000", "part-00000001", MANIFEST])
@pytest.mark.parametrize("harm", ["flipped", "cut", "empty", "version"])
def test_damaged_files_are_named_and_done_again(
    name: str, harm: str, corpus: Path, half_done: Path, tmp_path: Path
) -> None:
    path = half_done.with_name("out.npz.parts") / name
    data = path.read_bytes()
    middle = len(data) * 3 // 4
    path.write_bytes(
        {
            "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
            "cut": data[:middle],
            "empty": b"",
            "version": data.replace(f"layertap job {LAYOUT} ".encode(), b"layertap job 999 "),
        }[harm]
    )
    said: list[str] = []
    server = Server()
    run(job(corpus, half_done, said=said), server)
    assert len(said) == 1 and name in said[0] and ("another version" if harm == "version" else "damaged") in said[0]
    assert server.asked == (35 if name == "part-00000001" else 45)
    assert half_done.read_bytes() == whole(corpus, tmp_path)
    assert not half_done.with_name("out.npz.parts").exists()


@pytest.mark.parametrize("kept", [0, 1])
def test_a_job_that_died_while_it_published_is_finished_without_a_server(
    kept: int, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Destination, "publish", die)
        with pytest.raises(KeyboardInterrupt):
            run(job(corpus, tmp_path / "out.npz"))
    if kept:  # The side file had its name already.
        os.replace(tmp_path / "out.npz.parts" / "errors.jsonl", tmp_path / "out.npz.errors.jsonl")
    refused(
        job(corpus, tmp_path / "out.npz", fields=Fields(keep=("title",))), "holds a finished job with other settings"
    )
    server = Server()
    run(job(corpus, tmp_path / "out.npz"), server)
    assert server.asked == 0 and (tmp_path / "out.npz").read_bytes() == whole(corpus, tmp_path)


# Bad items, kept fields, precisions.


@pytest.mark.parametrize(("part_items", "count"), [(200, 200), (1000, 450)])
def test_a_wrong_field_ends_the_job_after_the_first_part_and_names_those_there(
    part_items: int, count: int, corpus: Path, tmp_path: Path
) -> None:
    corpus.write_text(corpus.read_text() * 10)
    one = job(corpus, tmp_path / "out.npz", fields=Fields(text="body"), part_items=part_items)
    missing = "item 1: the field body is missing; there are text, title, year"
    with pytest.raises(JobError, match=f"none of the first {count} items is good: {missing}"):
        run(one)
    assert sorted(os.listdir(tmp_path)) == ["in"]


def test_empty_texts_are_bad_items_and_their_first_reasons_are_told(corpus: Path, tmp_path: Path) -> None:
    outcome = run(job(corpus, tmp_path / "out.npz", part_items=1))
    assert (outcome.text_count, outcome.bad_count) == (38, 7)
    assert outcome.reasons == [f"item {n}: has no tokens" for n in (1, 8, 15)]


def test_kept_fields_are_in_every_format(corpus: Path, tmp_path: Path) -> None:
    fields = Fields(keep=("title", "year"))
    numbers = [n for n in range(45) if n % 7]
    for name in ("out.npz", "out.safetensors", "out.parquet"):
        run(job(corpus, tmp_path / name, fields=fields))
    with np.load(tmp_path / "out.npz") as found:
        assert found["title"].tolist() == [f"title {n}" for n in numbers]
        assert found["year"].dtype == np.float64
        np.testing.assert_array_equal(found["year"], [n if n % 5 else np.nan for n in numbers])
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names[:3] == ["ids", "title", "year"]
    assert table["year"].to_pylist() == [n if n % 5 else None for n in numbers]
    arrays = load_file(tmp_path / "out.safetensors")
    assert arrays["title_utf8"].tobytes().decode() == "".join(f"title {n}" for n in numbers)
    refused(job(corpus, tmp_path / "out.npy", fields=fields), "leave --keep out")
    with pytest.raises(JobError, match="--keep vector is the name of a column"):
        run(job(corpus, tmp_path / "other.npz", fields=Fields(keep=("vector",))))
    for keep in (("title", "title_utf8"), ("ids_ends",), ("__metadata__",)):
        with pytest.raises(JobError, match=f"--keep {keep[-1]} is the name of a column"):
            run(job(corpus, tmp_path / "other.safetensors", fields=Fields(keep=keep)))


@pytest.mark.parametrize("beside", [None, 1.5, 3], ids=["null", "float", "integer"])
def test_a_kept_number_is_never_rounded(beside: float | None, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    values = [2**53 + 1, beside, -(2**63)]
    corpus.write_text("".join(json.dumps({"text": "x", "key": value}) + "\n" for value in values))
    for name in ("out.npz", "out.parquet"):
        run(job(corpus, tmp_path / name, fields=Fields(keep=("key",))))
    with np.load(tmp_path / "out.npz") as found:
        assert found["key"].tolist() == (values if beside == 3 else ["" if v is None else str(v) for v in values])
    found = pq.read_table(tmp_path / "out.parquet")["key"].to_pylist()
    assert found == ([str(value) for value in values] if beside == 1.5 else values)


def test_kept_numbers_and_bools_keep_their_types(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    rows = [{"text": "x", "score": 0.25, "good": True}, {"text": "y", "score": 1, "good": False}]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(job(corpus, tmp_path / "out.parquet", fields=Fields(keep=("score", "good"))))
    found = pq.read_table(tmp_path / "out.parquet").to_pydict()
    assert (found["score"], found["good"]) == ([0.25, 1.0], [True, False])


def test_a_kept_field_that_no_item_has_is_told(corpus: Path, tmp_path: Path) -> None:
    said: list[str] = []
    run(job(corpus, tmp_path / "out.npz", fields=Fields(keep=("titel",)), said=said))
    assert said == ["--keep titel: none of the first 10 items has that field"]


def test_precisions_take_the_ranges_of_all_parts(corpus: Path, tmp_path: Path) -> None:
    run(job(corpus, tmp_path / "out.npz", task=Lengths("int8")))
    with np.load(tmp_path / "out.npz") as found:
        lengths = np.array([n % 7 for n in range(45) if n % 7], np.float32)
        wanted = quantize_embeddings(np.stack([lengths, -lengths], axis=1), precision="int8")
        assert found["vector"].dtype == np.int8 and np.array_equal(found["vector"], wanted)
    run(job(corpus, tmp_path / "bits.npz", task=Lengths("ubinary")))
    with np.load(tmp_path / "bits.npz") as found:
        assert found["vector"].tolist() == [[128]] * 38


# A job of a corpus of several files, whose manifest stays.


@pytest.fixture
def shard(tmp_path: Path) -> Callable[..., Job]:
    """A job that leaves its manifest in a folder beside the output."""
    work = tmp_path / "out" / "_layertap"
    work.mkdir(parents=True)

    def make(corpus: Path, **options: Any) -> Job:
        return job(corpus, tmp_path / "out" / "out.npz", work_folder=work, **options)

    return make


def test_a_finished_file_is_not_done_again(corpus: Path, shard: Callable[..., Job]) -> None:
    one = shard(corpus)
    first = run(one)
    assert (first.text_count, first.was_done) == (38, False)
    assert sorted(path.name for path in one.destination.folder.iterdir()) == ["layertap-job.json", "lock"]
    written = one.destination.output.stat().st_mtime_ns
    server = Server()
    again = run(shard(corpus), server)
    assert (again.text_count, again.was_done, server.asked) == (38, True, 0)
    os.utime(corpus)
    assert run(shard(corpus), server).was_done, "an input that was only copied is the same"
    assert server.asked == 0 and one.destination.output.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda corpus: corpus.write_text('{"text": "other"}\n'), "another input"),
        (lambda corpus: {"part_items": 7}, "part_items 10"),
        (lambda corpus: {"fingerprint": "e" * 64}, "fingerprint"),
    ],
)
def test_a_finished_file_of_another_kind_is_refused_or_replaced(
    change: Callable[[Path], Any], reason: str, corpus: Path, shard: Callable[..., Job]
) -> None:
    before = shard(corpus)
    run(before)
    kept = before.destination.output.read_bytes()
    changed = change(corpus)
    options = changed if isinstance(changed, dict) else {}
    server = Server(fingerprint=options.pop("fingerprint", FINGERPRINT))
    with pytest.raises(JobError, match=reason):
        run(shard(corpus, **options), server)
    assert before.destination.output.read_bytes() == kept and server.asked == 0
    assert run(shard(corpus, overwrite=True, **options), server).was_done is False
    assert run(shard(corpus, **options), server).was_done is True


def test_a_finished_file_that_is_gone_is_done_again(corpus: Path, shard: Callable[..., Job]) -> None:
    one = shard(corpus)
    run(one)
    kept = one.destination.output.read_bytes()
    one.destination.output.unlink()
    assert run(shard(corpus)).was_done is False
    assert one.destination.output.read_bytes() == kept


def test_an_empty_file_of_a_corpus_is_finished_without_an_output(corpus: Path, shard: Callable[..., Job]) -> None:
    corpus.write_text("")
    one = shard(corpus)
    assert run(one).text_count == 0 and not one.destination.output.exists()
    assert run(shard(corpus)).was_done


def test_what_a_crash_left_beside_the_manifest_of_the_end_is_removed(corpus: Path, shard: Callable[..., Job]) -> None:
    one = shard(corpus)
    run(one)
    (one.destination.folder / "part-00000000").write_bytes(b"half")
    server = Server()
    assert run(shard(corpus), server).was_done and server.asked == 0
    assert sorted(path.name for path in one.destination.folder.iterdir()) == ["layertap-job.json", "lock"]


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"layers": range(3)}, {"layers": [0, 1, 2]}),
        ({"layers": np.arange(3)}, {"layers": [0, 1, 2]}),
        ({"layers": np.int64(2), "attentions": 1}, {"layers": [2], "attentions": [1]}),
        ({"mix": LayerMix("mean", (0, 1))}, {"mix": LayerMix("mean", [0, 1])}),
        ({"mix": LayerMix("weighted", [0], np.array([0.5]))}, {"mix": LayerMix("weighted", [0], [0.5])}),
        ({"pooling": (Pooling("cls", np.int64(3)),)}, {"pooling": [Pooling("cls", 3)]}),
        ({"pooling": "mean", "windows": Windows()}, {"pooling": [Pooling("mean")], "windows": Windows(128)}),
    ],
)
def test_a_job_is_the_same_however_its_options_are_written(given: dict[str, Any], plain: dict[str, Any]) -> None:
    settings = EmbedTask.of(given).settings
    assert settings == EmbedTask.of(plain).settings == json.loads(json.dumps(settings))


def test_a_refusal_says_which_part_of_a_setting_is_another(corpus: Path, half_done: Path) -> None:
    class Pooled(Lengths):
        def __init__(self, strategy: str) -> None:
            super().__init__()
            self.settings = {"pooling": [{"layer": -1, "strategy": strategy}], "task": "lengths"}

    run(job(corpus, half_done, overwrite=True, task=Pooled("mean"), work_folder=half_done.parent))
    refused(
        job(corpus, half_done, task=Pooled("cls"), work_folder=half_done.parent),
        r"out\.npz was made with pooling\.0\.strategy 'mean', now it is 'cls'; name another folder",
    )
