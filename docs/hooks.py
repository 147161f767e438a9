"""Pages that are made from the code when the documentation is built: the server's flags and the contract."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from layertap_server.config import Config
from layertap_server.flags import flag, variable

_ROOT: Final = Path(__file__).parent.parent
_PROTO: Final = _ROOT / "protos/layertap/v1/embedding.proto"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    for path, content in (("reference/flags.md", flags_page()), ("reference/contract.md", contract_page())):
        files.append(File.generated(config, path, content=content))
    return files


def flags_page() -> str:
    """Returns the page of `layertap-server`'s flags, made from the fields of its config."""
    rows = [
        "# Flags of `layertap-server`",
        "",
        "Each flag is also an environment variable: `--max-batch-tokens` is `LAYERTAP_MAX_BATCH_TOKENS`. A flag wins "
        "over its variable.",
        "",
        "| flag | default | meaning |",
        "|---|---|---|",
    ]
    for field in dataclasses.fields(Config):
        assert variable(field.name) == "LAYERTAP_" + field.name.upper()
        rows.append(f"| `{flag(field.name)}` | {_default(field)} | {_meaning(field)} |")
    return "\n".join(rows) + "\n"


def _default(field: dataclasses.Field[Any]) -> str:
    return f"`{field.default}`" if field.default != "" else ""


def _meaning(field: dataclasses.Field[Any]) -> str:
    choices, unit = field.metadata["choices"], field.metadata["unit"]
    about = field.metadata["reason"].replace("|", "\\|")
    about += f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
    return about + (f" In {unit}." if unit else "")


def contract_page() -> str:
    """Returns the page of the contract: its comments as prose, its declarations as code."""
    text = _PROTO.read_text(encoding="utf-8")
    lines = ["# The contract", "", "`protos/layertap/v1/embedding.proto`, package `layertap.v1`.", ""]
    for prose, code in _declarations(text):
        name = re.match(r"(service|message|enum) (\w+)", code)
        lines += [f"## {name[2]}", ""] if name else []
        lines += ["```text", prose, "```", ""] if not name and prose else [prose, ""] if prose else []
        lines += ["```proto", code, "```", ""] if name else []
    return "\n".join(lines)


def _declarations(text: str) -> Iterator[tuple[str, str]]:
    """Yields the comment above each top-level declaration, without its slashes, and the declaration."""
    for block in re.split(r"\n\n(?=//|message|enum|service|syntax)", text):
        found = re.match(r"((?://.*\n)*)(.*)", block, re.DOTALL)
        assert found is not None
        prose = re.sub(r"^// ?", "", found[1], flags=re.MULTILINE).strip()
        yield prose, found[2].strip()
