"""The pieces of long jobs by themselves: sources, files that are whole or not there, parts, formats."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from safetensors import safe_open

from layertap.jobs import JobError, arrow, atomic_files, formats, readers
from layertap.jobs.columns import Column
from layertap.jobs.items import BadItem, Digest, Fields, Item
from layertap.jobs.part import MAX_PART_BYTES, PartBuilder
from layertap.jobs.parts import MANIFEST, Manifest, Parts
from layertap.jobs.readers import Arguments, JsonLines, Lines
from layertap.jobs.table import Table

# Sources.


@pytest.fixture
def file(tmp_path: Path) -> Callable[[bytes], Path]:
    """Writes a file."""

    def write(data: bytes) -> Path:
        path = tmp_path / "corpus"
        path.write_bytes(data)
        return path

    return write


@pytest.fixture
def json_of(file: Callable[[bytes], Path]) -> Callable[..., list[Item | BadItem]]:
    """Reads lines of JSON."""

    def read(*lines: str, id_field: str | None = "id") -> list[Item | BadItem]:
        data = "".join(line + "\n" for line in lines).encode("utf-8", "surrogatepass")
        return list(JsonLines(path=file(data), fields=Fields(id=id_field)).items())

    return read


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (b"", []),
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\ntwo", ["one", "two"]),
        (b"one\r\n\r\ntwo\r\n", ["one", "", "two"]),
        (b"\n", [""]),
        (b"\xef\xbb\xbfone\n", ["one"]),
        ("a\u2028b\x0bc\x85d\n".encode(), ["a\u2028b\x0bc\x85d"]),
    ],
)
def test_a_line_is_a_text(data: bytes, texts: list[str], file: Callable[[bytes], Path]) -> None:
    source = Lines(path=file(data))
    items = list(source.items())
    assert items == [Item(number=n, id=n, content=text) for n, text in enumerate(texts, 1)]
    assert source.count() == len(texts)


def test_a_line_that_is_not_utf_8_or_too_long_is_bad_and_the_others_go_on(file: Callable[[bytes], Path]) -> None:
    long = b"x" * (readers.MAX_LINE_BYTES + 3_000_000)
    good, invalid, endless, last = Lines(path=file(b"good\nb\xff\n" + long + b"\nlast")).items()
    assert isinstance(good, Item) and isinstance(last, Item) and (last.number, last.content) == (4, "last")
    assert isinstance(invalid, BadItem) and (invalid.number, invalid.id) == (2, None)
    assert "UTF-8 at byte 1" in invalid.reason
    assert isinstance(endless, BadItem) and endless.number == 3 and "longer than" in endless.reason


def test_json_lines_carry_texts_words_and_ids(json_of: Callable[..., list[Item | BadItem]]) -> None:
    assert json_of(
        '{"id": "a", "text": "one", "more": [1]}', "", '{"text": ["two", "words"], "id": 7}', '{"id": "é", "text": ""}'
    ) == [
        Item(number=1, id="a", content="one"),
        Item(number=3, id=7, content=["two", "words"]),
        Item(number=4, id="é", content=""),
    ]
    assert json_of('{"text": "one"}', id_field=None) == [Item(number=1, id=1, content="one")]


@pytest.mark.parametrize(
    ("line", "known", "reason"),
    [
        ("{", None, "not JSON"),
        ("[" * 100_000, None, "not JSON"),
        ('["text"]', None, "not a JSON object"),
        ('{"text": "x"}', None, "field id is missing"),
        ('{"id": true, "text": "x"}', None, "field id is missing, or neither"),
        ('{"id": 1.5, "text": "x"}', None, "field id is missing, or neither"),
        ('{"id": "' + "x" * 1025 + '", "text": "x"}', None, "1024 bytes"),
        ('{"id": "a\\u0000", "text": "x"}', None, "NUL"),
        ('{"id": "\\ud800", "text": "x"}', None, "cannot be written in UTF-8"),
        ('{"id": 1}', 1, "field text is missing"),
        ('{"id": 1, "text": null}', 1, "the field text is null, neither a string nor a list"),
        ('{"id": 1, "text": []}', 1, "neither a string nor a list"),
        ('{"id": 1, "text": ["a", 1]}', 1, "neither a string nor a list"),
        ('{"id": 1, "text": "private \\ud800"}', 1, "lone surrogate"),
    ],
)
def test_a_bad_line_of_json_is_reported_by_number_and_never_by_text(
    line: str, known: int | None, reason: str, json_of: Callable[..., list[Item | BadItem]]
) -> None:
    good, bad = json_of('{"id": 0, "text": "fine"}', line)
    assert isinstance(good, Item) and isinstance(bad, BadItem)
    assert (bad.number, bad.id, bad.code) == (2, known, "INVALID_ARGUMENT")
    assert reason in bad.reason and "private" not in bad.reason


def test_the_rows_of_a_parquet_file_are_items(tmp_path: Path) -> None:
    path = tmp_path / "corpus.parquet"
    texts = ["one", None, "", "four"] + [f"text {n}" for n in range(3000)]
    pq.write_table(pa.table({"name": [f"row {n}" for n in range(3004)], "body": texts}), path, row_group_size=700)
    source = arrow.ParquetRows(path=path, fields=Fields(text="body", id="name"))
    items = list(source.items())
    assert source.count() == len(items) == 3004
    assert items[0] == Item(number=1, id="row 0", content="one")
    assert isinstance(items[1], BadItem) and items[1].id == "row 1"
    assert items[-1] == Item(number=3004, id="row 3003", content="text 2999")
    words = tmp_path / "words.parquet"
    pq.write_table(pa.table({"text": [["a", "b"], ["c"]]}), words)
    found = arrow.ParquetRows(path=words, fields=Fields()).items()
    assert list(found) == [Item(number=1, id=1, content=["a", "b"]), Item(number=2, id=2, content=["c"])]
    with pytest.raises(JobError, match="no column text"):
        arrow.ParquetRows(path=path, fields=Fields())


def test_a_digest_tells_every_change_that_matters() -> None:
    def digest(*items: Item | BadItem) -> str:
        found = Digest()
        for item in items:
            found.add(item)
        return found.text()

    one = Item(number=1, id=1, content="a")
    others: list[tuple[Item | BadItem, ...]] = [
        (),
        (Item(number=2, id=1, content="a"),),
        (Item(number=1, id="1", content="a"),),
        (Item(number=1, id=1, content="b"),),
        (Item(number=1, id=1, content=["a"]),),
        (Item(number=1, id=1, content="a", kept=("b",)),),
        (BadItem(number=1, id=1, code="INVALID_ARGUMENT", reason="a"),),
        (one, one),
    ]
    assert len({digest(one), *(digest(*other) for other in others)}) == len(others) + 1


# Files that are whole or not there.


def test_a_file_that_is_not_written_to_its_end_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_files.writing(path) as file:
        file.write(b"new, but only half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    with atomic_files.writing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))
    try:
        with pytest.raises(OSError, match=r"out\.tmp") as raised, atomic_files.writing(tmp_path / "out") as file:
            file.write(bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.filename == str(tmp_path / "out.tmp") and not (tmp_path / "out").exists()


def test_only_one_is_at_work_in_a_folder(tmp_path: Path) -> None:
    with (
        atomic_files.locked(tmp_path / "lock"),
        pytest.raises(JobError, match="another process works"),
        atomic_files.locked(tmp_path / "lock"),
    ):
        pass
    with atomic_files.locked(tmp_path / "lock"):
        pass


def test_a_file_system_that_cannot_write_names_to_the_disk_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr("os.fsync", refuse_folders)
    with atomic_files.writing(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_file_system_without_locks_is_not_taken_for_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(OSError, match="locks") as raised, atomic_files.locked(tmp_path / "lock"):
        pass
    assert raised.value.filename == str(tmp_path / "lock")


# Parts and formats.

COLUMNS = (
    Column(name="token_counts", dtype="<i8", row_shape=()),
    Column(name="truncated", dtype="|b1", row_shape=()),
    Column(name="layer_2", dtype="<f4", row_shape=(3,), counts="token_counts"),
    Column(name="pool_0", dtype="<f2", row_shape=(4,)),
)


def rows_of(number: int) -> list[np.ndarray]:
    count = number % 3 + 1
    return [
        np.array([count]),
        np.array([number % 2 == 0]),
        np.full((count, 3), number, np.float32) + np.arange(count, dtype=np.float32)[:, None],
        np.full((1, 4), number, np.float16),
    ]


def builder(limit: int = 1000) -> PartBuilder:
    return PartBuilder(max_item_count=limit, keep=(), accept=lambda columns: None)


def filled(folder: Path, ids: list[int | str], *, part_items: int = 3) -> Parts:
    """Parts with a bad item in front and one behind, and a part of nothing but a bad one."""
    folder.mkdir()
    made = Parts(folder)
    made.begin(Manifest(settings={"x": 1}, model_id="a-model", fingerprint="f" * 64))
    bad = BadItem(number=99, id=None, code="INVALID_ARGUMENT", reason="is no text")
    part = builder()
    part.add_bad(bad)
    made.add(part, "only bad")
    part = builder()
    for number, one in enumerate(ids):
        part.add(Item(number=number, id=one, content="x"), COLUMNS, rows_of(number))
        if part.item_count == part_items:
            made.add(part, f"to {number}")
            part = builder()
    part.add_bad(bad)
    made.add(part, "the end")
    return made


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(filled(tmp_path / "parts", [n * 10 for n in range(8)]))


def expected(count: int) -> dict[str, np.ndarray]:
    names = [column.name for column in COLUMNS]
    return dict(zip(names, map(np.concatenate, zip(*map(rows_of, range(count)), strict=True)), strict=True))


def same(found: dict[str, Any], wanted: dict[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array), name


def written(writer: formats.Writer, table: Table, path: Path) -> Path:
    with atomic_files.writing(path) as file:
        writer(table, file)
    return path


def test_parts_are_found_again_up_to_the_first_gap(tmp_path: Path) -> None:
    made = filled(tmp_path / "parts", list(range(8)))
    again = Parts(made.folder)
    assert again.done == made.done and len(again.done) == 4
    assert (again.item_count, again.digest, again.manifest) == (10, "the end", made.manifest)
    assert [json.loads(line)["number"] for line in b"".join(again.bad_lines()).splitlines()] == [99, 99]
    (made.folder / "part-00000002").unlink()
    assert [one.digest for one in Parts(made.folder).done] == ["only bad", "to 2"]
    (made.folder / MANIFEST).unlink()
    assert Parts(made.folder).done == []


def test_a_folder_is_removed_with_all_that_is_its_own_and_nothing_else(tmp_path: Path) -> None:
    made = filled(tmp_path / "one", [1])
    made.output.write_bytes(b"x")
    made.remove()
    assert not made.folder.exists()
    made = filled(tmp_path / "two", [1])
    (made.folder / "of the user").touch()
    made.remove()
    assert os.listdir(made.folder) == ["of the user"]


def test_a_part_is_full_by_count_or_by_size() -> None:
    part = builder(2)
    assert not part.is_full
    part.add_bad(BadItem(number=1, id=1, code="INTERNAL", reason="x"))
    part.add(Item(number=2, id=2, content="x"), COLUMNS, rows_of(2))
    assert part.is_full and part.item_count == 2
    big = Column(name="pool_0", dtype="<f4", row_shape=(MAX_PART_BYTES // 8,))
    part = builder()
    for number, full in ((1, False), (2, True)):
        part.add(Item(number=number, id=number, content="x"), (big,), [np.zeros((1, *big.row_shape), np.float32)])
        assert part.is_full == full


def test_npz_is_what_numpy_reads(table: Table, tmp_path: Path) -> None:
    path = written(formats.writer_of(Path("x.npz")), table, tmp_path / "out.npz")
    with np.load(path) as found:
        same(dict(found), {"ids": np.arange(0, 80, 10), **expected(8)})


def test_npy_holds_the_only_matrix(tmp_path: Path) -> None:
    path = Path("x.npy")
    with pytest.raises(JobError, match="layer_2, pool_0"):
        formats.check_columns(path, COLUMNS)
    with pytest.raises(JobError, match="one matrix"):
        formats.check_columns(path, COLUMNS[:3])
    formats.check_columns(path, (*COLUMNS[:2], COLUMNS[3]))
    made = filled(tmp_path / "parts", [])
    part = builder()
    for number in range(5):
        counts, truncated, _, pool = rows_of(number)
        part.add(Item(number=number, id=number, content="x"), (*COLUMNS[:2], COLUMNS[3]), [counts, truncated, pool])
    made.add(part, "the end")
    found = np.load(written(formats.writer_of(path), Table(made), tmp_path / "out.npy"))
    assert np.array_equal(found, expected(5)["pool_0"]) and found.dtype == np.float16


def test_safetensors_is_what_its_library_reads(table: Table, tmp_path: Path) -> None:
    path = written(formats.writer_of(Path("x.safetensors")), table, tmp_path / "out.safetensors")
    same(safetensors.numpy.load_file(path), {"ids": np.arange(0, 80, 10), **expected(8)})
    with safe_open(path, "numpy") as file:
        assert file.metadata() == {"model_id": "a-model", "fingerprint": "f" * 64}


def test_parquet_and_arrow_have_a_row_a_text(table: Table, tmp_path: Path) -> None:
    found = pq.read_table(written(formats.writer_of(Path("x.parquet")), table, tmp_path / "out.parquet"))
    path = written(formats.writer_of(Path("x.arrow")), table, tmp_path / "out.arrow")
    with pa.OSFile(str(path)) as file:
        assert pa.ipc.open_file(file).read_all().equals(found)
    wanted = expected(8)
    assert found.column_names == ["ids", *wanted]
    assert found["ids"].to_pylist() == list(range(0, 80, 10))
    assert found.schema.field("pool_0").type == pa.list_(pa.float16(), 4)
    assert found.schema.field("layer_2").type.value_type == pa.list_(pa.float32(), 3)
    assert found.schema.metadata[b"model_id"] == b"a-model"
    for name in ("token_counts", "truncated", "pool_0"):
        assert np.array_equal(np.stack(found[name].to_numpy(zero_copy_only=False).tolist()), wanted[name])
    rows = [np.array(rows, np.float32) for rows in found["layer_2"].to_pylist()]
    assert [len(one) for one in rows] == wanted["token_counts"].tolist()
    assert np.array_equal(np.concatenate(rows), wanted["layer_2"])


@pytest.mark.parametrize("ids", [["a", "é" * 30, "", "d"], [1, "b", 3, 4], [1, 2, 3, 2**63], [1, 2, -(2**63) - 1, 4]])
def test_ids_are_integers_if_all_are_else_strings(ids: list[int | str], tmp_path: Path) -> None:
    table = Table(filled(tmp_path / "parts", ids, part_items=2))
    texts = [str(one) for one in ids]
    with np.load(written(formats.writer_of(Path("x.npz")), table, tmp_path / "out.npz")) as found:
        assert found["ids"].tolist() == texts
    found = safetensors.numpy.load_file(written(formats.writer_of(Path("x.safetensors")), table, tmp_path / "out.st"))
    data, ends = found["ids_utf8"].tobytes(), found["ids_ends"].tolist()
    assert [data[begin:end].decode() for begin, end in zip([0, *ends], ends, strict=False)] == texts
    rows = pq.read_table(written(formats.writer_of(Path("x.parquet")), table, tmp_path / "out.parquet"))
    assert rows["ids"].to_pylist() == texts


@pytest.mark.parametrize("ending", ["npz", "safetensors", "parquet", "arrow"])
def test_the_same_parts_give_the_same_bytes(ending: str, table: Table, tmp_path: Path) -> None:
    writer = formats.writer_of(Path(f"x.{ending}"))
    one, other = written(writer, table, tmp_path / "one"), written(writer, table, tmp_path / "other")
    assert one.read_bytes() == other.read_bytes()


def test_an_unknown_ending_is_refused() -> None:
    with pytest.raises(JobError, match=r"use \.npz, \.npy"):
        formats.writer_of(Path("out.csv"))


def test_arguments_are_numbered_from_1() -> None:
    source = Arguments(texts=["a", "b"])
    assert list(source.items()) == [Item(number=1, id=1, content="a"), Item(number=2, id=2, content="b")]
    assert source.count() == 2


def test_large_tables_come_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sizes(table: Table) -> Iterator[int]:
        return (len(block.labels["ids"]) for block in table.blocks())

    table = Table(filled(tmp_path / "parts", list(range(8))))
    assert list(sizes(table)) == [8]
    monkeypatch.setattr("layertap.jobs.table._BLOCK_TEXTS", 6)
    assert list(sizes(table)) == [6, 2]
    first = table._parts[0].byte_count
    assert first == sum(table._parts[0].array(column.name).nbytes for column in table._parts[0].columns)
    for most, wanted in ((1, [3, 3, 2]), (first, [3, 3, 2]), (2 * first, [6, 2])):
        monkeypatch.setattr("layertap.jobs.table._BLOCK_BYTES", most)
        assert list(sizes(table)) == wanted
