"""The Python of the README and of every page of docs/ runs, against a server with the embedded model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support import Server

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ELSEWHERE = ROOT / "docs/operate/corpora.md"
"""Needs Ray, Spark and Dask: tests/corpora runs what Spark and Dask need, and calls what Ray needs."""
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text()) and page != ELSEWHERE]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_of_a_page_runs(page: Path, real_server: Server, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in BLOCK.finditer(text):
        code = block[1].replace('"127.0.0.1:50051"', f'"{real_server.address}"')
        assert not re.search(r"Client\(\)|50051", code), "a block would use a server that is not the test's"
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + code, str(page), "exec"), namespace)
    for value in namespace.values():
        if hasattr(value, "close") and type(value).__name__ == "Client":
            value.close()


def test_most_pages_of_the_guide_have_code() -> None:
    guide = [page for page in WITH_CODE if page.parent.name == "guide"]
    assert len(guide) >= 7 and ROOT / "README.md" in WITH_CODE
