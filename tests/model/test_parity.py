"""The command that compares a running server with transformers: on real servers, and what it makes of wrong answers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import ROOT, Server
from support.results import COUNTS, SIZE, embedding, numbers, tokens

from layertap import Embedding, Tokens
from layertap_server import cli
from layertap_server.parity import compare
from layertap_server.parity.compare import BOUNDS, Comparison
from layertap_server.parity.reference import Wanted

BENCHMARKS = ROOT / "docs" / "benchmarks.md"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["parity", *arguments])
    return code, *capsys.readouterr()


def differences(out: str) -> dict[str, float]:
    rows = re.findall(r"^(layer \d+|pooler_output) +(\S+) ", out, re.MULTILINE)
    return {name: float(difference) for name, difference in rows}


def test_a_server_passes_with_a_sample_of_all_kinds(real_server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--target", real_server.address)
    assert code == 0 and f"{len(compare.SAMPLE)} texts, " in out and "pass: no difference is above 2e-05" in out
    assert re.search("^tokens +equal$", out, re.MULTILINE)
    found = differences(out)
    assert list(found) == [*(f"layer {layer}" for layer in range(7)), "pooler_output"]
    assert 0 < max(found.values()) <= BOUNDS["float32"]


def test_texts_come_from_arguments_and_a_file(
    real_server: Server, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("one\n\nthree\n", encoding="utf-8")
    code, out, _ = run(capsys, "--target", real_server.address, "--file", str(file), "I love Paris", "Hello")
    assert code == 0 and "5 texts, 16 tokens" in out


def test_what_is_beyond_the_bound_is_named(real_server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--target", real_server.address, "--bound", "1e-9", "I love Paris")
    beyond = [name for name, difference in differences(out).items() if difference > 1e-9]
    assert code == 1 and beyond and out.endswith(f"\nFAIL: {', '.join(beyond)}\n")
    assert out.count("  beyond 1e-09\n") == len(beyond)


def test_a_model_of_ones_own_is_named_by_its_folder(
    tiny_server: Server, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "--target", tiny_server.address, "--model-id", str(tiny_folder), "I love Paris")
    assert code == 0 and len(differences(out)) == 5


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--target", "127.0.0.1:1"], "no server answers at 127.0.0.1:1"),
        (["--file", "/nowhere/at/all"], "No such file"),
        (["--file", "/dev/null"], "--file has no line"),
        (["--model-id", "/nowhere/at/all"], "--model-id names a folder that does not exist"),
        ([], "the server serves 'tiny-bert"),
        (["x" * 200_000], "inputs[0]"),
    ],
    ids=["no server", "no file", "an empty file", "no model", "another model", "a text that is refused"],
)
def test_what_cannot_be_compared_says_why(
    tiny_server: Server, tiny_folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    if reason == "inputs[0]":
        arguments = [*arguments, "--model-id", str(tiny_folder)]
    code, _, err = run(capsys, "--target", tiny_server.address, *arguments)
    assert code == 2 and err.startswith("layertap-server parity: ") and reason in err and err.count("\n") == 1


@pytest.mark.parametrize(("flag", "code"), [("--help", 0), ("--nonsense", 2)])
def test_help_and_wrong_usage(capsys: pytest.CaptureFixture[str], flag: str, code: int) -> None:
    with pytest.raises(SystemExit) as ended:
        run(capsys, flag)
    assert ended.value.code == code
    out = capsys.readouterr().out
    assert all(f"{dtype} {bound:g}" in out for dtype, bound in BOUNDS.items()) == (code == 0)


def test_the_documents_publish_the_bounds() -> None:
    rows = re.search(r"largest difference \|\n\|---\|---\|\n((?:\|.+\n)+)", BENCHMARKS.read_text())[1]
    published = {
        dtype: float(row.rsplit("|", 2)[1]) for row in rows.splitlines() for dtype in re.findall(r"`(\w+)`", row)
    }
    assert published == BOUNDS


# What it makes of answers. Two texts of 5 and 3 tokens, 7 layers, 4 values wide.


def answer(**changes: Any) -> Embedding:
    return dataclasses.replace(embedding(layers=tuple(range(7)), pooler=True, _tokens=tokens()), **changes)


def wanted() -> list[Wanted]:
    good, every = answer(), tokens()
    names = ("input_ids", "attention_mask", "token_type_ids", "special_tokens_mask", "word_ids", "offset_mapping")
    return [
        Wanted(
            tokens=every.tokens[n],
            facts={name: getattr(every, name)[n, :count] for name in names},
            layers=[good.ragged(layer)[n] for layer in range(7)],
            pooler_output=good.pooler_output[n],
        )
        for n, count in enumerate(COUNTS)
    ]


def compared(found: Embedding, *, has_pooler_output: bool = True) -> Comparison:
    made = Comparison(bound=1e-3, has_pooler_output=has_pooler_output)
    made.add(answer(), wanted())
    made.add(found, wanted())
    return made


def test_equal_answers_pass() -> None:
    made = compared(answer())
    assert made.beyond == [] and made.text_count == 4 and made.token_count == 16
    assert set(differences("\n".join(made.table())).values()) == {0.0}


def off_by(value: float) -> Embedding:
    found = answer()
    found.ragged(3)[1][2, 1] += value
    return found


@pytest.mark.parametrize(
    ("value", "shown"), [(0.5, r"5\.0e-01"), (-0.5, r"5\.0e-01"), (np.nan, "inf"), (np.inf, "inf"), (5e-4, "")]
)
def test_one_wrong_number_is_found_where_it_is(value: float, shown: str) -> None:
    made = compared(off_by(value))
    assert made.beyond == (["layer 3"] if shown else [])
    assert not shown or re.search(rf"\nlayer 3 +{shown} +3 +\S+  beyond 0\.001\n", "\n".join(made.table()))


def test_the_worst_difference_stays_whatever_comes_after_it() -> None:
    made = Comparison(bound=1e-3, has_pooler_output=True)
    for found in (off_by(float("nan")), off_by(0.5), answer()):
        made.add(found, wanted())
    assert made.beyond == ["layer 3"] and re.search(r"\nlayer 3 +inf +1 ", "\n".join(made.table()))


def test_a_wrong_pooler_output_counts_only_where_there_is_one() -> None:
    wrong = answer(_pooler_output=numbers(2, SIZE) + 1)
    assert compared(wrong).beyond == ["pooler_output"]
    assert compared(wrong, has_pooler_output=False).beyond == []


def changed(name: str) -> Callable[[Tokens], Tokens]:
    def change(given: Tokens) -> Tokens:
        array = getattr(given, name).copy()
        array[1, 1] += 1
        return dataclasses.replace(given, **{name: array})

    return change


@pytest.mark.parametrize(
    "change",
    [
        *map(changed, ("input_ids", "attention_mask", "token_type_ids", "special_tokens_mask", "word_ids")),
        changed("offset_mapping"),
        lambda given: dataclasses.replace(given, tokens=[given.tokens[0], ["[CLS]", "Hello", "[SEP]"]]),
    ],
)
def test_any_other_token_is_found(change: Callable[[Tokens], Tokens]) -> None:
    made = compared(answer(_tokens=change(tokens())))
    assert made.beyond == ["tokens"] and made.other_tokens == [3]
    assert any(re.fullmatch("tokens +differ in text 3", line) for line in made.table())


def test_other_token_counts_are_infinitely_far() -> None:
    cut = [dataclasses.replace(one, layers=[layer[:-1] for layer in one.layers]) for one in wanted()]
    made = Comparison(bound=1e-3, has_pooler_output=True)
    made.add(answer(), cut)
    assert made.beyond == [f"layer {layer}" for layer in range(7)]
