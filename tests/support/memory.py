"""The most memory that a server takes, as docs/operate/limits-and-sizing.md says it: a table of products of flags."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

_PAGE = Path(__file__).parents[2] / "docs/operate/limits-and-sizing.md"
_ROW = re.compile(r"\| [^|]+ \| (?P<product>[^|]*(?:`--[a-z-]+`|×)[^|]*) \| (?P<size>\d+) MiB \|")


def sums(flags: Mapping[str, int]) -> Iterator[tuple[int, int]]:
    """Yields of each row its bytes with these flags, and those that the page says of the defaults."""
    section = _PAGE.read_text().split("## Memory")[1].split("##")[0]
    for row in _ROW.finditer(section):
        factors = [factor.strip().strip("`") for factor in row["product"].split("×")]
        product = math.prod(flags[one.removeprefix("--")] if one.startswith("--") else int(one) for one in factors)
        yield product, int(row["size"]) << 20
