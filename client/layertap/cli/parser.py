"""The arguments of the command line and their help."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Final

from layertap import __version__, wire
from layertap.cli import commands, embed, shell
from layertap.connection import DEFAULT_TARGET

_EXAMPLES: Final = """\
examples:
  layertap tokenize 'I love Paris' --pad-to 7
  layertap embed 'I love Paris' --layers all
  layertap embed --pooling mean --json < texts.txt
  layertap embed --layers=-1,-2 --pooler-output -o out.npz < texts.txt
  layertap decode 101 1045 2293 3000 102
  layertap health --target 10.0.0.7:50051 && layertap info --target 10.0.0.7:50051

Texts are arguments or, without any, lines of stdin; an empty line is a text. Before a text that begins with a dash
write --, before negative layers = (--layers=-1,-2). The variables LAYERTAP_TARGET and LAYERTAP_TIMEOUT_S replace the
defaults; LAYERTAP_TLS_CA, LAYERTAP_TLS_CERT, LAYERTAP_TLS_KEY and LAYERTAP_TOKEN say how to come in.

exit codes: 0 done; 1 the server refused, failed, did not answer or is not serving; 2 wrong usage."""


def build() -> argparse.ArgumentParser:
    """Returns the parser; what it parses has the command as `run`."""
    common = argparse.ArgumentParser(add_help=False)
    target = os.environ.get("LAYERTAP_TARGET") or DEFAULT_TARGET
    timeout_s = os.environ.get("LAYERTAP_TIMEOUT_S") or "60"
    common.add_argument("--target", default=target, help="the server, as host:port [%(default)s]")
    common.add_argument("--timeout-s", type=float, default=timeout_s, help="wait so long for an answer [%(default)s]")
    common.add_argument("--json", action="store_true", help="print one JSON object a line")

    texts = argparse.ArgumentParser(add_help=False)
    texts.add_argument("texts", nargs="*", metavar="TEXT", help="texts; none: the lines of stdin")
    texts.add_argument("--truncation", choices=wire.TRUNCATIONS, help="above --max-length [error]", default="error")
    texts.add_argument("--max-length", type=int, help="the most tokens of a text [the model's]")

    parser = argparse.ArgumentParser(
        prog="layertap",
        description="Tokens, pooled vectors and every layer of a BERT, from a layertap server.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"layertap {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    tokenize = subparsers.add_parser("tokenize", parents=[texts, common], help="show texts as the model's tokens")
    tokenize.add_argument("--pad-to", type=int, help="pad each text to so many tokens")
    tokenize.add_argument("--no-special-tokens", action="store_true", help="leave [CLS] and [SEP] out")
    tokenize.set_defaults(run=commands.tokenize)

    decode = subparsers.add_parser("decode", parents=[common], help="turn token ids back into text")
    decode.add_argument("ids", nargs="*", metavar="ID", help="the ids of one text; none: a text each line")
    decode.add_argument("--keep-special-tokens", action="store_true", help="show [CLS], [SEP] and [PAD] too")
    decode.set_defaults(run=commands.decode)

    embedding = subparsers.add_parser(
        "embed", parents=[texts, common], help="get layers, pooler output and pooled vectors"
    )
    embedding.add_argument(
        "--layers", type=shell.layers, help="all, or numbers such as 0,6 or =-1,-2 [last, if nothing else]"
    )
    embedding.add_argument(
        "--pooling", action="append", choices=wire.POOLING_STRATEGIES, help="may be given several times"
    )
    embedding.add_argument("--pooler-output", action="store_true", help="the model's own pooler")
    embedding.add_argument("--dtype", choices=wire.DTYPES, default="float32", help="on the wire [%(default)s]")
    contents = "write all numbers to a new file: token_counts, layer_K (ragged rows), pool_N, pooler_output"
    embedding.add_argument("-o", "--output", type=Path, metavar="OUT.npz", help=contents)
    embedding.set_defaults(run=embed.embed)
    subparsers.add_parser("info", parents=[common], help="show the served model and the limits").set_defaults(
        run=commands.info
    )
    subparsers.add_parser("health", parents=[common], help="exit with 0 if the server serves").set_defaults(
        run=commands.health
    )
    return parser
