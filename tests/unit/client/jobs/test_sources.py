"""What a file of texts may be: compressed, CSV, Parquet with bad strings; and what is refused as a whole, once."""

from __future__ import annotations

import argparse
import gzip
import io
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from layertap.cli import arguments, parsing
from layertap.jobs import JobError
from layertap.jobs.arrow import ParquetRows
from layertap.jobs.items import BadItem, Fields, Item, json_line
from layertap.jobs.readers import Arguments, Csv, JsonLines, Lines


def parsed(*given: str) -> argparse.Namespace:
    return arguments.build().parse_args(["embed", *given])


def contents(items: object) -> list[object]:
    return [one.content if isinstance(one, Item) else one.reason for one in items]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "A b.txt"])
def test_an_argument_that_names_a_file_is_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"one\ntwo\n") if name.endswith(".gz") else b"one\ntwo\n")
    assert contents(parsing.source(parsed(str(path))).items()) == ["one", "two"]


@pytest.mark.parametrize(
    "text",
    ["corpus.jsonl.gz", "corpus.csv", "data/corpus", "corpus.xlsx", "corpus.jsonl.zst", "my corpus.jsonl", "C:\\a"],
)
def test_an_argument_that_looks_like_a_file_is_never_embedded_as_a_text(text: str) -> None:
    with pytest.raises(parsing.UsageError, match="--text"):
        parsing.source(parsed(text))
    source = parsing.source(parsed("--text", text))
    assert isinstance(source, Arguments) and contents(source.items()) == [text]


@pytest.mark.parametrize("text", ["a" * 300 + ".txt", "https://example.com/" + "a" * 300, "./" + "a" * 300 + "?b"])
def test_a_file_that_cannot_exist_is_said_not_to_be_there(text: str, tmp_path: Path) -> None:
    with pytest.raises(parsing.UsageError, match=r"there is no file .*--text"):
        parsing.source(parsed(text))
    with pytest.raises(JobError, match="there is no file"):
        parsing.shards(parsed(text, text, "-o", str(tmp_path)))
    assert isinstance(parsing.source(parsed("--text", text)), Arguments)


@pytest.mark.parametrize(
    "text", ["I love Paris", "and/or is fine in a sentence", "Hello.", "3.14", "", "a\0b", "x" * 5000]
)
def test_other_arguments_are_texts(text: str) -> None:
    assert isinstance(parsing.source(parsed(text)), Arguments)


def test_an_argument_that_names_a_folder_is_never_embedded_as_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpus").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(parsing.UsageError, match=r"corpus is a folder; .* --text"):
        parsing.source(parsed("corpus"))


def test_a_file_of_an_unknown_format_is_refused_with_the_formats(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text("all:\n")
    with pytest.raises(parsing.UsageError, match=r"\.jsonl, \.csv, \.tsv"):
        parsing.source(parsed(str(tmp_path / "Makefile")))
    with pytest.raises(parsing.UsageError, match="is a folder"):
        parsing.source(parsed(f"{tmp_path}/"))


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_is_told_that_it_is_read(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", argparse.Namespace(isatty=lambda: is_terminal))
    assert parsing.source(parsed()) == Lines(path=None)
    assert ("reading texts from the terminal" in capsys.readouterr().err) == is_terminal


@pytest.mark.parametrize("flag", ["--id-field", "--text-field", "--keep"])
def test_a_field_of_a_file_without_fields_is_refused(flag: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    for given in (str(tmp_path / "a.txt"), "one"):
        with pytest.raises(parsing.UsageError, match=f"{flag} names a field"):
            parsing.source(parsed(given, flag, "x"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_utf_16_is_refused_once_with_how_to_convert_it(encoding: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes("text\none\ntwo\n".encode(encoding))
    fields = Fields()
    source: Lines = {
        "txt": Lines(path=path),
        "jsonl": JsonLines(path=path, fields=fields),
        "csv": Csv(path=path, fields=fields, delimiter=","),
    }[kind]
    with pytest.raises(JobError, match="iconv -f UTF-"):
        list(source.items())


def test_a_damaged_gzip_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"some lines\n" * 100_000)[:-20])
    with pytest.raises(JobError, match=r"a\.txt\.gz cannot be unpacked"):
        list(Lines(path=path).items())
    path.with_suffix("").write_bytes(gzip.compress(b"x"))
    with pytest.raises(JobError, match="compressed with gzip"):
        list(Lines(path=path.with_suffix("")).items())


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {n}" for n in range(3000)]}), path)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 4 : len(whole) // 2] = bytes(len(whole) // 2 - len(whole) // 4)
    path.write_bytes(whole)
    with pytest.raises(JobError, match=r"a\.parquet cannot be read as Parquet"):
        list(ParquetRows(path=path, fields=Fields()).items())


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.symlink_to("/proc/self/mem")
    for source in (Lines(path=path), Csv(path=path, fields=Fields(), delimiter=",")):
        with pytest.raises(OSError, match="Input/output error") as raised:
            list(source.items())
        assert raised.value.filename == str(path)


def test_rows_of_csv_are_items(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        '\ufeffid,text,title\r\n1,"a, ""b""\nc",é\r\n\r\n2,plain,\r\n3\r\n'.encode() + b"4,caf\xe9,x\r\n5,last,y\n"
    )
    first, second, short, invalid, last = Csv(path=path, fields=Fields(id="id", keep=("title",)), delimiter=",").items()
    assert first == Item(number=1, id="1", content='a, "b"\nc', kept=("é",))
    assert second == Item(number=2, id="2", content="plain", kept=("",))
    assert isinstance(short, BadItem) and short.id == "3" and "field text is missing; there are id" in short.reason
    assert isinstance(invalid, BadItem) and invalid.id == "4" and "not valid UTF-8" in invalid.reason
    assert isinstance(last, Item) and (last.number, last.content) == (5, "last")
    with pytest.raises(JobError, match="no column body; there are id, text, title"):
        list(Csv(path=path, fields=Fields(text="body"), delimiter=",").items())


def test_a_row_that_is_not_csv_is_one_bad_item(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text\nfirst\nse\rcond\nthird\n")
    first, broken, third = Csv(path=path, fields=Fields(), delimiter=",").items()
    assert isinstance(broken, BadItem) and broken.number == 2 and "not CSV" in broken.reason
    assert first == Item(number=1, id=1, content="first") and third == Item(number=3, id=3, content="third")


def test_names_of_columns_that_are_not_csv_are_refused_once(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text\rone\rtwo\r")
    with pytest.raises(JobError, match=r"a\.csv does not begin with the names of columns"):
        list(Csv(path=path, fields=Fields(), delimiter=",").items())
    path.write_bytes(b"\r\ntext\r\none\r\n")
    assert contents(Csv(path=path, fields=Fields(), delimiter=",").items()) == ["one"]


def test_a_row_of_csv_with_more_values_than_columns_is_bad_and_never_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"id,text\n1,Hello, world\n2,whole,\n")
    cut, whole = Csv(path=path, fields=Fields(), delimiter=",").items()
    assert isinstance(cut, BadItem) and cut.number == 1 and "has 3 values, the header 2 columns" in cut.reason
    assert whole == Item(number=2, id=2, content="whole")  # What programs end each row with is no value.


def test_a_quote_that_stays_open_makes_no_text_of_all_rows_below(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,text\n1,first\n2,"second\n3,third\n4,fourth\n')
    first, open_ended = Csv(path=path, fields=Fields(), delimiter=",").items()
    assert first == Item(number=1, id=1, content="first")
    assert isinstance(open_ended, BadItem) and open_ended.number == 2 and "is a quote missing?" in open_ended.reason
    path.write_bytes(b'text\n"second\nthird\n"fourth\nfifth\n"in" quotes\n')
    swallowed, fifth, changed = Csv(path=path, fields=Fields(), delimiter=",").items()
    assert isinstance(swallowed, BadItem) and fifth == Item(number=2, id=2, content="fifth")
    assert isinstance(changed, BadItem) and "is a quote missing?" in changed.reason
    path.write_bytes(b'text\n"last, without a line end"')
    assert contents(Csv(path=path, fields=Fields(), delimiter=",").items()) == ["last, without a line end"]


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,n,text\na,1,b\n")
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(JobError, match=r"a\.csv has 2 columns text"):
        list(Csv(path=tmp_path / "a.csv", fields=Fields(), delimiter=",").items())
    with pytest.raises(JobError, match=r"a\.parquet has 2 columns text"):
        ParquetRows(path=tmp_path / "a.parquet", fields=Fields())


@pytest.mark.parametrize(
    ("flag", "value", "hint"),
    [
        ("--layers", "first", "pass numbers such as 0,6"),
        ("--attention-heads", "0,", "pass numbers such as 0,6"),
        ("--mix", "median:0,6", "pass such as mean:-4,-3,-2,-1"),
        ("--mix", "mean", "pass such as mean:-4,-3,-2,-1"),
        ("--mix", "weighted:0,6:a,b", "weights are numbers with commas"),
        ("--pooling-layer", "top", "pass such as mean:-4,-3,-2,-1"),
        ("--window-stride", "wide", "pass a number of tokens, such as 128"),
        ("--keep", "title,title", "pass field names such as title,url, each once"),
        ("--keep", "ids", "pass field names such as title,url, each once; ids is the name of the ids"),
        ("--shard", "8/8", "pass such as 0/8"),
        ("--part-texts", "0", "it starts at 1"),
    ],
)
def test_a_value_that_a_flag_does_not_take_is_refused_with_one_that_it_takes(
    flag: str, value: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed(f"{flag}={value}", "a text")
    assert ended.value.code == 2 and f"argument {flag}: {hint}" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_a_parquet_string_that_is_not_utf_8_is_one_bad_item(kind: pa.DataType, tmp_path: Path) -> None:
    binary = pa.large_binary() if kind == pa.large_string() else pa.binary()
    plain = pa.array([b"caf\xe9", b"ok", None], binary).view(kind if not pa.types.is_dictionary(kind) else pa.string())
    texts = plain.dictionary_encode() if pa.types.is_dictionary(kind) else plain
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    invalid, good, null = ParquetRows(path=tmp_path / "a.parquet", fields=Fields()).items()
    assert isinstance(invalid, BadItem) and "not valid UTF-8" in invalid.reason
    assert good == Item(number=2, id=2, content="ok")
    assert isinstance(null, BadItem) and "neither a string" in null.reason


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (Fields(text="n"), "column n is of type int64; texts are strings"),
        (Fields(id="text"), None),
        (Fields(id="x"), "column x is of type double; ids are"),
        (Fields(keep=("raw",)), "column raw is of type binary; bytes cannot be kept"),
        (Fields(text="body"), "no column body; there are text, n, x, raw"),
    ],
)
def test_a_parquet_column_of_a_wrong_type_is_refused_once(fields: Fields, reason: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"], "n": [1], "x": [0.5], "raw": [b"x"]}), path)
    if reason is None:
        ParquetRows(path=path, fields=fields)
        return
    with pytest.raises(JobError, match=reason):
        ParquetRows(path=path, fields=fields)


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        (pa.array([1_700_000_000_123_456_789], pa.timestamp("ns")), "2023-11-14 22:13:20.123456789"),
        (pa.array([1], pa.time64("ns")), "00:00:00.000000001"),
        (pa.array([1], pa.date32()), "1970-01-02"),
        (pa.array([2**30], pa.date32()), "<value out of range: 1073741824>"),
    ],
)
def test_kept_times_have_all_their_digits(values: pa.Array, kept: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x"], "time": values}), tmp_path / "a.parquet")
    (item,) = ParquetRows(path=tmp_path / "a.parquet", fields=Fields(keep=("time",))).items()
    assert isinstance(item, Item) and item.kept == (kept,)


def test_a_value_that_cannot_be_read_is_named_by_its_column(tmp_path: Path) -> None:
    far = pa.array([[2**62]], pa.list_(pa.timestamp("us")))
    pq.write_table(pa.table({"text": ["x"], "times": far}), tmp_path / "a.parquet")
    with pytest.raises(JobError, match=r"a\.parquet: the column times has a value that cannot be read"):
        list(ParquetRows(path=tmp_path / "a.parquet", fields=Fields(keep=("times",))).items())


def test_kept_values_keep_their_types(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "a": 1, "b": {"c": [true]}, "d": null}\n{"text": "x", "a": "\\ud800"}\n')
    first, second = JsonLines(path=path, fields=Fields(keep=("a", "b", "d", "e"))).items()
    assert isinstance(first, Item) and first.kept == (1, '{"c": [true]}', None, None)
    assert isinstance(second, BadItem) and "field a" in second.reason


def test_what_steers_a_terminal_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "a\x1b[2J\x9b\u202e\n\udcffé"
    parsing.warn(evil)
    parsing.say(evil)
    found = capsys.readouterr()
    assert found.out == "a\\x1b[2J\\x9b\\u202e\\n\\udcffé\n" and found.err == f"layertap: {found.out}"
    line = json_line({"id": evil + "\x7f"})
    assert line.isprintable() and "é" in line
    assert parsing.to_json({"id": "\x7f\x1b"}) == '{"id": "\\u007f\\u001b"}'


def test_a_lost_stdout_is_told_and_a_lost_stderr_says_nothing_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr", None)
    parsing.warn("x")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("sys.stdout", None)
    parsing.mention("x")
    with pytest.raises(OSError, match="stdout is closed"):
        parsing.say("x")


def test_an_error_of_a_full_disk_is_not_told_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(full.buffer, write_through=False))
        parsing.mention("x")
        parsing.say("y")
        parsing.drop_stdout()
