"""What the documents say is true of the code: links, flags, limits, metrics of packages, the length of the README."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from layertap_server.config import Config
from layertap_server.flags import flag
from layertap_server.model.architectures import MODEL_TYPES
from layertap_server.parity.compare import BOUNDS

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
FLAGS = {flag(field.name): field.default for field in dataclasses.fields(Config)}


def test_the_readme_is_one_screen_long() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    generated = {ROOT / "docs/reference/flags.md", ROOT / "docs/reference/contract.md"}
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            path = (page.parent / target).resolve()
            assert path.exists() or path in generated, f"{target} does not exist"


def test_every_view_of_the_page_has_small_pictures_in_both_colours() -> None:
    static = (ROOT / "client/layertap/explore/static").glob("*.js")
    views = {one[1] for path in static if (one := re.search(r'^  id: "(\w+)",$', path.read_text(), re.MULTILINE))}
    pictures = {path.stem: path.stat().st_size for path in (ROOT / "docs/explore").glob("*.png")}
    assert len(views) == 7 and pictures.keys() == {
        f"{view}-{colours}" for view in views for colours in ("light", "dark")
    }
    assert max(pictures.values()) < 150_000


def test_the_limits_of_the_documents_are_those_of_the_config() -> None:
    page = (ROOT / "docs/operate/limits-and-sizing.md").read_text()
    rows = re.findall(r"^\| .+? \| (.+?) \| `(--[a-z-]+)` \|$", page, re.MULTILINE)
    assert len(rows) >= 17
    for shown, name in rows:
        assert _number(shown) == FLAGS[name], name


def test_every_limit_of_the_config_is_in_the_documents() -> None:
    page = (ROOT / "docs/operate/limits-and-sizing.md").read_text()
    limits = {name for name in FLAGS if name.startswith("--max-") and "batch" not in name}
    assert limits <= set(re.findall(r"--[a-z-]+", page))


def test_the_fidelity_table_has_every_model_type_and_output_within_the_bound() -> None:
    page = (ROOT / "docs/benchmarks.md").read_text()
    head, table = re.findall(r"^\| output \| (.+) \|\n\|[-|]+\n((?:\|.+\n)+)", page, re.MULTILINE)[0]
    assert head == " | ".join(f"`{kind}`" for kind in MODEL_TYPES)
    rows = [row.strip("| ").split(" | ") for row in table.splitlines()]
    assert len(rows) >= 8
    for output, *differences in rows:
        bound = 1e-5 if "encode" in output else BOUNDS["float32"]
        assert len(differences) == len(MODEL_TYPES), output
        assert all(one == "has none" or 0 < float(one) <= bound for one in differences), output


def test_the_page_of_models_names_every_model_type() -> None:
    page = (ROOT / "docs/operate/models.md").read_text()
    assert all(f"`{kind}`" in page for kind in MODEL_TYPES)


def test_the_clients_of_the_table_have_the_versions_that_are_locked_and_tests_that_exist() -> None:
    locked = {
        name: version
        for lock in ("compat", "cpu")
        for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / f"locks/{lock}.txt").read_text(), re.MULTILINE)
    }
    page = (ROOT / "docs/guide/other-clients.md").read_text()
    rows = re.findall(r"^\| (.+?) \| ([\d.]+|any) \| .+ \| `(tests/compat/\w+\.py)` \|$", page, re.MULTILINE)
    assert {test for _, _, test in rows} == {
        f"tests/compat/{path.name}"
        for path in (ROOT / "tests/compat").glob("test_*.py")
        if path.stem != "test_environment"
    }
    for client, version, _ in rows:
        names = [name for name in re.findall(r"[\w-]+", client) if name in locked]
        assert version == "any" or locked[names[0]].startswith(f"{version}."), client
    recipes = (ROOT / "docs/guide/openai.md").read_text()
    for name in ("openai", "langchain-openai"):
        assert f"| {name} {locked[name]} |" in recipes, name


def test_the_classifiers_and_the_documents_have_the_pythons_that_are_tested() -> None:
    (names,) = re.findall(r"^PYTHONS \?= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    versions = [name.removeprefix("python") for name in names.split()]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    assert versions == named and project["requires-python"] == f">={versions[0]}"
    for page in ("README.md", "CONTRIBUTING.md", "docs/operate/install.md"):
        text = (ROOT / page).read_text()
        assert f"Python {versions[0]} or newer" in text and f"{versions[0]} to {versions[-1]} are tested" in text, page


def test_flags_in_the_documents_exist() -> None:
    for page in PAGES:
        for line in page.read_text().splitlines():
            if "layertap-server" in line and "parity" not in line:
                found = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", line))
                assert found <= {*FLAGS, "--version", "--help"}, f"{page.name}: {line}"


def test_the_picture_and_the_table_of_the_design_have_the_packages() -> None:
    page = (ROOT / "docs/design.md").read_text()
    for half in ("server/layertap_server", "client/layertap"):
        for package in (ROOT / half).iterdir():
            if (package / "__init__.py").is_file() and package.name not in ("v1", "__pycache__"):
                assert f"`{package.name}`" in page, package.name
    picture = (ROOT / "docs/design.svg").read_text()
    for name in re.findall(r'class="name">(\w+)<', picture):
        assert f"`{name}`" in page


def _number(shown: str) -> float:
    """Reads a limit as the documents write it."""
    if shown == "unlimited":
        return 0.0
    units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "s": 1}
    total = 0.0
    for sign, (number, unit) in zip((1, -1), re.findall(r"([\d,]+) ?([KMG]iB|s)?", shown), strict=False):
        total += sign * float(number.replace(",", "")) * units.get(unit, 1)
    return total


DIALECT = re.compile(
    r"\b(lanes?|nobody|whoever|halving|doorbells?|bells|crew|reception|intake|mend(s|ed)?)\b", re.IGNORECASE
)


def test_code_and_documents_use_the_words_of_the_field() -> None:
    files = [*PAGES, *(ROOT / "protos").rglob("*.proto"), *(ROOT / "deploy").rglob("*.*")]
    files += [path for half in ("client", "server") for path in (ROOT / half).rglob("*.py") if path.parent.name != "v1"]
    assert len(files) > 120
    found = [f"{path.relative_to(ROOT)}: {word[0]}" for path in files for word in DIALECT.finditer(path.read_text())]
    assert not found
