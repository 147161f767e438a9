"""`layertap-server parity`: compares a running server with transformers, on any model and any texts.

Asks the server as every client does, so that all of it is judged: tokenizer, encoder, wire and SDK. Exit codes: 0 every
difference is within its bound, 1 one is not, 2 there is nothing to compare: no server, another model, no texts.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from layertap._transport.settings import DEFAULT_TARGET
from layertap.client import Client
from layertap.errors import LayertapError, counted
from layertap.model_info import ModelInfo
from layertap.results.embedding import Embedding
from layertap_server.model import checkpoint
from layertap_server.model.checkpoint import Checkpoint, CheckpointError

if TYPE_CHECKING:
    from layertap_server.parity.reference import Item, Wanted

BOUNDS: Final[Mapping[str, float]] = {"float32": 2e-5, "bfloat16": 0.1, "float16": 0.1}
"""How far any number may be from transformers' own in float32, by what the server multiplies matrices in.

float16 rounds finer than bfloat16, and is held to the same.
"""

_PROSE: Final = "The quick brown fox jumps over the lazy dog. Résumé, naïve café: 東京, Москва, 3.14159 and :-) too. "
SAMPLE: Final[Sequence[Item]] = (
    "I love Paris",
    "",
    _PROSE,
    _PROSE * 40,  # Longer than most models take, so that it is cut.
    ("A pair of texts,", "and the second one is a little longer."),
    ["words", "that", "were", "tokenized", "", "before"],
    *(_PROSE[: 3 * n] for n in range(1, 20)),
)
"""What is compared if no texts are given: short and long, empty, of several scripts, pairs and words."""

_TEXTS_PER_REQUEST: Final = 8
_EXAMPLES: Final = """\
examples:
  layertap-server parity                                        the embedded model, with texts of its own
  layertap-server parity --target 10.0.0.7:50051 --model-id bert-base-uncased 'I love Paris' Hello
  layertap-server parity --model-id ./my-bert --file texts.txt

Largest differences that pass, by the server's --dtype: {bounds}.

exit codes: 0 all within the bound; 1 something beyond it; 2 nothing to compare: no server, another model, no texts."""


class NothingToCompareError(Exception):
    """Server and model here cannot be compared; the message is one line with the next step."""


@dataclasses.dataclass(slots=True, kw_only=True)
class Row:
    """How far one output is from what it should be.

    Attributes:
        difference: The largest, of all texts; infinite where a shape or number is not one.
        text: The position of the text that has it.
        magnitude: The largest number that was wanted.
    """

    name: str
    difference: float = 0.0
    text: int = 0
    magnitude: float = 0.0

    def add(self, text: int, found: npt.NDArray[np.floating], wanted: npt.NDArray[np.float32]) -> None:
        """Adds one text."""
        difference = float("inf")
        if found.shape == wanted.shape:
            difference = float(np.abs(found - wanted).max(initial=0.0))
        if not difference <= self.difference:
            self.difference, self.text = difference if difference == difference else float("inf"), text
        self.magnitude = max(self.magnitude, float(np.abs(wanted).max(initial=0.0)))


class Comparison:
    """What is known so far of how far a server is from transformers. Pure."""

    def __init__(self, *, bound: float, has_pooler_output: bool) -> None:
        self.bound = bound
        self.has_pooler_output = has_pooler_output
        self.text_count = 0
        self.token_count = 0
        self.other_tokens: list[int] = []
        self._rows: dict[str, Row] = {}

    def add(self, embedding: Embedding, wanted: Sequence[Wanted]) -> None:
        """Adds texts: the answer of the server, and the reference of each."""
        for n, one in enumerate(wanted):
            text = self.text_count + n
            if not _same_tokens(embedding, n, one):
                self.other_tokens.append(text)
            for layer, states in enumerate(one.layers):
                self._row(f"layer {layer}").add(text, embedding.ragged(layer)[n], states)
            if self.has_pooler_output and one.pooler_output is not None:
                self._row("pooler_output").add(text, embedding.pooler_output[n], one.pooler_output)
        self.text_count += len(wanted)
        self.token_count += int(embedding.token_counts.sum())

    @property
    def beyond(self) -> list[str]:
        """What is not as it should be."""
        rows = [row.name for row in self._rows.values() if not row.difference <= self.bound]
        return ["tokens", *rows] if self.other_tokens else rows

    def table(self) -> Iterator[str]:
        """Yields the lines of a table."""
        yield "output         largest difference  in text  largest value"
        others = ", ".join(map(str, self.other_tokens[:5])) + (", …" if len(self.other_tokens) > 5 else "")
        yield f"tokens         {f'differ in text {others}' if self.other_tokens else 'equal':>18}"
        for row in self._rows.values():
            verdict = "" if row.difference <= self.bound else f"  beyond {self.bound:g}"
            yield f"{row.name:13}  {row.difference:18.1e}  {row.text:7}  {row.magnitude:13.2f}{verdict}"

    def _row(self, name: str) -> Row:
        return self._rows.setdefault(name, Row(name=name))


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except (NothingToCompareError, CheckpointError, LayertapError, OSError, UnicodeError) as exc:
        print(f"layertap-server parity: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(args: argparse.Namespace) -> int:
    texts = _texts(args)
    with Client(args.target) as client:
        info = client.model_info(timeout_s=args.timeout_s)
        found = checkpoint.find(
            model_id=args.model_id, revision=args.revision, name="", load_format="safetensors", seed=0
        )
        _check_same(info, found)
        # Imported here, so that a missing server is reported at once, without torch.
        from layertap_server.parity import reference

        judge = reference.Oracle.load(found.weights_folder, found.tokenizer_folder)
        where = f"{info.model_id} in {info.compute_dtype} on {', '.join(info.devices)} at {args.target}"
        print(f"{where}, beside transformers {reference.VERSION} in float32 (eager)", flush=True)
        bound = BOUNDS[info.compute_dtype] if args.bound is None else args.bound
        comparison = Comparison(bound=bound, has_pooler_output=info.has_pooler_output)
        for first in range(0, len(texts), _TEXTS_PER_REQUEST):
            some = texts[first : first + _TEXTS_PER_REQUEST]
            embedding = client.embed(
                some,
                layers="all",
                pooler_output=info.has_pooler_output,
                truncation="right",
                return_tokens=True,
                timeout_s=args.timeout_s,
            )
            comparison.add(embedding, [judge.compute(text, info.max_length) for text in some])
    print(
        f"{counted(comparison.text_count, 'text')}, {comparison.token_count} tokens, fingerprint {info.fingerprint}\n"
    )
    print(*comparison.table(), sep="\n")
    if comparison.beyond:
        print(f"\nFAIL: {', '.join(comparison.beyond)}")
        return 1
    print(f"\npass: no difference is above {comparison.bound:g}")
    return 0


def _parser() -> argparse.ArgumentParser:
    bounds = ", ".join(f"{dtype} {bound:g}" for dtype, bound in BOUNDS.items())
    parser = argparse.ArgumentParser(
        prog="layertap-server parity",
        description="Compares a running server with transformers, layer by layer, on your own model and texts.",
        epilog=_EXAMPLES.format(bounds=bounds),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    target = os.environ.get("LAYERTAP_TARGET") or DEFAULT_TARGET
    model_id = os.environ.get("LAYERTAP_MODEL_ID", "")
    revision = os.environ.get("LAYERTAP_REVISION", "")
    parser.add_argument("--target", default=target, help="the server, as host:port [%(default)s]")
    parser.add_argument(
        "--model-id", default=model_id, help="the model that it serves: a folder or a hub name [embedded]"
    )
    parser.add_argument("--revision", default=revision, help="the branch, tag or commit of a hub model")
    parser.add_argument("--file", type=Path, help="read texts from this file, one a line")
    parser.add_argument("--bound", type=float, help="the largest difference that passes [by the server's dtype]")
    parser.add_argument("--timeout-s", type=float, default=60.0, help="wait so long for an answer [%(default)g]")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="texts; none, and no file: a sample of all kinds")
    return parser


def _texts(args: argparse.Namespace) -> Sequence[Item]:
    if args.file is None:
        return args.texts or SAMPLE
    lines = args.file.read_text(encoding="utf-8").splitlines()
    if not lines:
        raise NothingToCompareError("--file has no line; put a text on each")
    return [*args.texts, *lines]


def _check_same(info: ModelInfo, found: Checkpoint) -> None:
    from layertap_server.model.tokenizer import Tokenizer

    tokenizer = Tokenizer(found.tokenizer_folder)
    own = found.fingerprint(
        tokenizer=tokenizer.description,
        sentences=tokenizer.sentence_config(found).description,
        dtype=info.compute_dtype,
    )
    if own != info.fingerprint:
        raise NothingToCompareError(
            f"the server serves {info.model_id!r} with fingerprint {info.fingerprint[:12]}…, {found.name!r} here has "
            f"{own[:12]}…; name the very model that it serves with --model-id and --revision, and see that both sides "
            "have the same version of tokenizers"
        )


def _same_tokens(embedding: Embedding, n: int, wanted: Wanted) -> bool:
    tokens, count = embedding.tokens, int(embedding.token_counts[n])
    return tokens.tokens[n] == wanted.tokens and all(
        np.array_equal(getattr(tokens, name)[n, :count], values) for name, values in wanted.facts.items()
    )
