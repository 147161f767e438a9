"""Model folders with the files of sentence-transformers: what its modules and configurations say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from layertap_server.model import sentence_config as sentences

QUERY = "Represent the query, please: "
POOLINGS = ["cls", "max", "mean", "mean_sqrt_len_tokens", "lasttoken"]
MODULE = "sentence_transformers.models."
TRANSFORMER = {"path": "", "type": MODULE + "Transformer"}
POOLING = {"path": "1_Pooling", "type": MODULE + "Pooling"}
NORMALIZE = {"path": "2_Normalize", "type": MODULE + "Normalize"}


def write(folder: Path, **files: Any) -> Path:
    """Writes JSON files, `1_Pooling__config` as 1_Pooling/config.json."""
    for name, contents in files.items():
        path = folder / (name.removeprefix("_").replace("__", "/") + ".json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(contents))
    return folder


def modules(*given: dict[str, str]) -> list[dict[str, Any]]:
    return [{"idx": n, "name": str(n), **one} for n, one in enumerate(given)]


def read(folder: Path) -> sentences.SentenceConfig:
    return sentences.read(folder, hidden_size=32, max_length=600, position_count=512, truncation="right")


def save_instructed(tiny_folder: Path, folder: Path) -> Path:
    """All poolings joined, without the prompt; normalized, then cut; a default prompt; a low length."""
    shutil.copytree(tiny_folder, folder)
    return write(
        folder,
        modules=modules(TRANSFORMER, POOLING, NORMALIZE),
        sentence_bert_config={"max_seq_length": 24, "do_lower_case": False},
        config_sentence_transformers={
            "prompts": {"query": QUERY, "passage": "passage: ", "long": "long " * 40},
            "default_prompt_name": "query",
            "truncate_dim": 150,
        },
        _1_Pooling__config={"embedding_dimension": 32, "pooling_mode": POOLINGS, "include_prompt": False},
    )
