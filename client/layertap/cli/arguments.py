"""The arguments of the command line."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from layertap import __version__, wire
from layertap._transport.settings import DEFAULT_TARGET
from layertap.cli import commands, embed, help, parsing
from layertap.jobs.job import DEFAULT_PART_ITEMS


def build() -> argparse.ArgumentParser:
    """Returns the parser; what it parses has the command as `run`."""
    parser = argparse.ArgumentParser(
        prog="layertap",
        description="Tokens, pooled vectors and every layer of a BERT, from a layertap server.",
        epilog=help.ALL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"layertap {__version__}")
    commands_of = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, summary: str, examples: str) -> argparse.ArgumentParser:
        return commands_of.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    _tokenize(command("tokenize", "show texts as the model's tokens", help.TOKENIZE))
    _decode(command("decode", "turn token ids back into text", help.DECODE))
    _embed(command("embed", "get layers, pooler output and pooled vectors", help.EMBED))
    _question(command("info", "show the served model and the limits", help.INFO)).set_defaults(run=commands.info)
    _question(command("health", "exit with 0 if the server serves", help.HEALTH)).set_defaults(run=commands.health)
    return parser


def _question(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    target = os.environ.get("LAYERTAP_TARGET") or DEFAULT_TARGET
    parser.add_argument("--target", default=target, help="the server, as host:port [%(default)s]")
    timeout_s = os.environ.get("LAYERTAP_TIMEOUT_S") or "60"
    parser.add_argument("--timeout-s", type=float, default=timeout_s, help="wait so long for an answer [%(default)s]")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    return parser


def _texts(parser: argparse.ArgumentParser) -> None:
    what = "texts; or one file: .txt, .jsonl, .parquet; none, or -: lines of stdin"
    parser.add_argument("texts", nargs="*", metavar="TEXT", help=what)
    parser.add_argument("--truncation", choices=wire.TRUNCATIONS, help="above --max-length [error]", default="error")
    parser.add_argument("--max-length", type=int, metavar="N", help="the most tokens of a text [the model's]")
    reading = parser.add_argument_group("reading a file")
    reading.add_argument("--input-format", choices=parsing.FORMATS, help="[by the ending; of stdin txt]")
    what = "of .jsonl and .parquet: the text, or a list of its words [%(default)s]"
    reading.add_argument("--text-field", default="text", metavar="NAME", help=what)
    what = "of .jsonl and .parquet: strings or whole numbers [the number of the line or row, from 1]"
    reading.add_argument("--id-field", metavar="NAME", help=what)


def _tokenize(parser: argparse.ArgumentParser) -> None:
    _texts(parser)
    parser.add_argument("--pad-to", type=int, metavar="N", help="pad each text to so many tokens")
    parser.add_argument("--no-special-tokens", action="store_true", help="leave [CLS] and [SEP] out")
    _question(parser).set_defaults(run=commands.tokenize)


def _decode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", nargs="*", metavar="ID", help="the ids of one text; none: a text each line of stdin")
    parser.add_argument("--keep-special-tokens", action="store_true", help="show [CLS], [SEP] and [PAD] too")
    _question(parser).set_defaults(run=commands.decode)


def _embed(parser: argparse.ArgumentParser) -> None:
    _texts(parser)
    what = "all, or numbers such as 0,6 or =-1,-2 [the last, if nothing else is asked for]"
    parser.add_argument("--layers", type=parsing.layers, help=what)
    what = f"one row a word instead of a token: {', '.join(wire.WORD_POOLINGS)} of its tokens' rows"
    parser.add_argument("--words", choices=wire.WORD_POOLINGS, metavar="POOLING", help=what)
    what = "several layers as one, such as mean:-4,-3,-2,-1 or concat:-1,-2 or weighted:0,6:0.5,2"
    parser.add_argument("--mix", type=parsing.mix, help=what)
    what = "put before each text, as it stands"
    parser.add_argument("--prompt", metavar="TEXT", help=what)
    parser.add_argument("--prompt-name", metavar="NAME", help="the same, by its name in the model's folder")
    parser.add_argument("--pooler-output", action="store_true", help="the model's own pooler")
    parser.add_argument("--dtype", choices=wire.DTYPES, default="float32", help="on the wire [%(default)s]")
    pooling = parser.add_argument_group("pooled vectors")
    what = f"{', '.join(wire.POOLING_STRATEGIES)}; may be given several times"
    pooling.add_argument("--pooling", action="append", choices=wire.POOLING_STRATEGIES, metavar="STRATEGY", help=what)
    what = "the layer that is pooled, or a mix as in --mix [the last]"
    pooling.add_argument("--pooling-layer", type=parsing.layer_or_mix, default=-1, metavar="K", help=what)
    pooling.add_argument("--pool-no-special-tokens", action="store_true", help="leave [CLS] and [SEP] out of pools")
    pooling.add_argument("--normalize", action="store_true", help="to length 1, after --dimensions")
    pooling.add_argument("--dimensions", type=int, metavar="N", help="keep the first N values")
    writing = parser.add_argument_group("writing a file")
    what = "a new file: .npz, .npy, .safetensors, .parquet or .arrow (the last two need the extra arrow)"
    writing.add_argument("-o", "--output", type=Path, metavar="OUT", help=what)
    what = "replace OUT if it is there, and parts of an OUT that would be another"
    writing.add_argument("--overwrite", action="store_true", help=what)
    what = "the most texts in a part, which is what a crash can cost [%(default)s]"
    writing.add_argument("--part-texts", type=_count, default=DEFAULT_PART_ITEMS, metavar="N", help=what)
    what = "show how far it is (needs the extra progress) [on a terminal]"
    writing.add_argument("--progress", action=argparse.BooleanOptionalAction, help=what)
    _question(parser).set_defaults(run=embed.embed)


def _count(value: str) -> int:
    if (count := int(value)) < 1:
        raise argparse.ArgumentTypeError("it starts at 1")
    return count
