"""The arguments of the command line."""

from __future__ import annotations

import argparse
import functools
import os
import re
from pathlib import Path
from typing import Final

from layertap import __version__, quantization, wire
from layertap._transport.settings import DEFAULT_TARGET
from layertap.cli import commands, completion, examples, parsing
from layertap.jobs import shards
from layertap.jobs.job import DEFAULT_PART_ITEMS
from layertap.jobs.readers import FORMATS
from layertap.sentence_transformers import SENTENCE, TOKENS

_NEGATIVE_NUMBERS: Final = re.compile(r"-\d[-\d,.]*$")
"""What begins with a dash and is no flag: of itself argparse knows a single number only, and refuses -1,-2."""


def build() -> argparse.ArgumentParser:
    """Returns the parser; what it parses has the command as `run`."""
    parser = argparse.ArgumentParser(
        prog="layertap",
        description="Tokens, pooled vectors and every layer of a BERT, from a layertap server.",
        epilog=examples.ALL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"layertap {__version__}")
    commands_of = parser.add_subparsers(required=True, metavar="COMMAND", title="commands (each has its own --help)")

    def command(name: str, summary: str, epilog: str, *, usage: str = "[--flag value ...]") -> argparse.ArgumentParser:
        found = commands_of.add_parser(
            name,
            usage=f"layertap {name} {usage}",
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        found._negative_number_matcher = _NEGATIVE_NUMBERS
        return found

    texts = "[--flag value ...] [TEXT ...]"
    _tokenize(command("tokenize", "show texts as the model's tokens", examples.TOKENIZE, usage=texts))
    _decode(command("decode", "turn token ids back into text", examples.DECODE, usage="[--flag value ...] [ID ...]"))
    _embed(command("embed", "get layers, words, pooler output and pooled vectors", examples.EMBED, usage=texts))
    _encode(command("encode", "get one vector a text, as sentence-transformers does", examples.ENCODE, usage=texts))
    _server(command("info", "show the served model and the limits", examples.INFO)).set_defaults(run=commands.info)
    _server(command("health", "exit with 0 if the server serves", examples.HEALTH)).set_defaults(run=commands.health)
    _explore(command("explore", "show in the browser what the model does with a sentence", examples.EXPLORE))
    summary = "print a script that completes commands and flags in a shell"
    completing = command("completion", summary, examples.COMPLETION, usage="{bash,zsh}")
    completing.add_argument("shell", choices=completion.SHELLS)
    completing.set_defaults(run=functools.partial(completion.show, commands_of.choices))
    return parser


def _server(parser: argparse.ArgumentParser, *, prints_json: bool = True) -> argparse.ArgumentParser:
    target = os.environ.get("LAYERTAP_TARGET") or DEFAULT_TARGET
    if prints_json:
        parser.add_argument("--json", action="store_true", help="print JSON, one object a line")
    connecting = parser.add_argument_group("the server")
    what = "where it listens: host:port, unix:/path, or dns:///name:port for all servers of a name [%(default)s]"
    connecting.add_argument("--target", default=target, help=what)
    timeout_s = os.environ.get("LAYERTAP_TIMEOUT_S") or "60"
    what = "how many seconds to wait for an answer [%(default)s]"
    connecting.add_argument("--timeout-s", type=float, default=timeout_s, metavar="N", help=what)
    return parser


def _texts(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    what = "texts; or a file: .txt, .jsonl, .csv, .tsv (each also with .gz), .parquet; none, or -: lines of stdin"
    parser.add_argument("texts", nargs="*", metavar="TEXT", help=what)
    parser.add_argument("--text", action="store_true", help="the arguments are texts, whatever they look like")
    reading = parser.add_argument_group("reading a file")
    reading.add_argument(
        "--input-format", choices=FORMATS, help="how the input is read [by the ending of its name; stdin as txt]"
    )
    what = "the field or column of the text, or of a list of its words [text]"
    reading.add_argument("--text-field", metavar="NAME", help=what)
    what = "the field or column of the id, a string or a whole number [the number of the line or row, from 1]"
    reading.add_argument("--id-field", metavar="NAME", help=what)
    return reading


def _cutting(parser: argparse.ArgumentParser) -> None:
    what = (
        "what a text above --max-length loses: its end (right) or its beginning (left); error refuses it [%(default)s]"
    )
    parser.add_argument("--truncation", choices=wire.TRUNCATIONS, help=what, default="error")
    parser.add_argument("--max-length", type=int, metavar="N", help="the most tokens of a text [the model's]")


def _windows(parser: argparse.ArgumentParser) -> None:
    what = "let texts above the length run as windows that share N tokens, instead of refusing or cutting them"
    parser.add_argument("--window-stride", type=parsing.windows, dest="windows", metavar="N", help=what)


def _prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", metavar="TEXT", help="what to put before each text, as it stands")
    parser.add_argument("--prompt-name", metavar="NAME", help="the same by its name, as info shows it")


def _writing(parser: argparse.ArgumentParser, reading: argparse._ArgumentGroup) -> None:
    what = "fields or columns that are carried to OUT, with commas between them"
    reading.add_argument("--keep", type=parsing.names, metavar="NAMES", help=what)
    writing = parser.add_argument_group("writing a file")
    what = "a new file: .npz, .npy, .safetensors, .parquet or .arrow (the last two need the extra arrow); or a folder"
    writing.add_argument("-o", "--output", type=Path, metavar="OUT", help=what)
    what = f"where OUT is a folder: {', '.join(shards.OUTPUTS)} [{shards.OUTPUTS[0]}]"
    writing.add_argument("--output-format", choices=shards.OUTPUTS, metavar="FORMAT", help=what)
    what = "do only this share of the files, such as 0/8 to 7/8, as the jobs of an array do [all]"
    writing.add_argument("--shard", type=parsing.share, metavar="I/N", help=what)
    what = "replace OUT if it is there, and parts of an OUT that would be another"
    writing.add_argument("--overwrite", action="store_true", help=what)
    what = "the most texts in a part, which is what a crash can cost [%(default)s]"
    writing.add_argument("--part-texts", type=_count, default=DEFAULT_PART_ITEMS, metavar="N", help=what)
    what = "show progress (needs the extra progress) [on a terminal]"
    writing.add_argument("--progress", action=argparse.BooleanOptionalAction, help=what)


def _tokenize(parser: argparse.ArgumentParser) -> None:
    _texts(parser)
    _cutting(parser)
    parser.add_argument("--pad-to", type=int, metavar="N", help="pad each text to so many tokens")
    parser.add_argument(
        "--no-special-tokens", action="store_true", help="leave out special tokens such as [CLS] and [SEP]"
    )
    _server(parser).set_defaults(run=commands.tokenize)


def _decode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", nargs="*", metavar="ID", help="the ids of one text; none: a text each line of stdin")
    parser.add_argument(
        "--keep-special-tokens", action="store_true", help="show special tokens too, such as [CLS], [SEP] and [PAD]"
    )
    _server(parser).set_defaults(run=commands.decode)


def _embed(parser: argparse.ArgumentParser) -> None:
    reading = _texts(parser)
    _cutting(parser)
    _windows(parser)
    what = "all, or numbers such as 0,6 or -1,-2 [the last, if nothing else is requested]"
    parser.add_argument("--layers", type=parsing.layers, help=what)
    what = f"one row a word instead of a token: {', '.join(wire.WORD_POOLINGS)} of its tokens' rows"
    parser.add_argument("--words", choices=wire.WORD_POOLINGS, metavar="POOLING", help=what)
    what = "several layers as one, such as mean:-4,-3,-2,-1 or concat:-1,-2 or weighted:0,6:0.5,2"
    parser.add_argument("--mix", type=parsing.mix, help=what)
    what = "attention probabilities of encoder blocks: all, or numbers such as 0,5 or -1; they grow with length²"
    parser.add_argument("--attentions", type=parsing.layers, metavar="LAYERS", help=what)
    what = "which heads of them, such as 0,3 [all]"
    parser.add_argument("--attention-heads", type=parsing.numbers, metavar="HEADS", help=what)
    _prompts(parser)
    parser.add_argument("--pooler-output", action="store_true", help="get the output of the model's own pooler too")
    parser.add_argument("--dtype", choices=wire.DTYPES, default="float32", help="the type of the numbers [%(default)s]")
    pooling = parser.add_argument_group("pooled vectors (for what sentence-transformers gives, use layertap encode)")
    what = f"get one vector a text: {', '.join(wire.POOLING_STRATEGIES)}; may be given several times"
    pooling.add_argument("--pooling", action="append", choices=wire.POOLING_STRATEGIES, metavar="STRATEGY", help=what)
    what = "the layer that is pooled, or a mix as in --mix [the last]"
    pooling.add_argument("--pooling-layer", type=parsing.layer_or_mix, default=-1, metavar="K", help=what)
    pooling.add_argument("--pool-no-special-tokens", action="store_true", help="leave special tokens out of pools")
    pooling.add_argument("--normalize", action="store_true", help="scale vectors to length 1, after --dimensions")
    pooling.add_argument("--dimensions", type=int, metavar="N", help="keep the first N values of each vector")
    _writing(parser, reading)
    _server(parser).set_defaults(run=commands.embed)


def _encode(parser: argparse.ArgumentParser) -> None:
    reading = _texts(parser)
    _windows(parser)
    _prompts(parser)
    parser.add_argument(
        "--normalize", action="store_true", help="scale vectors to length 1, also if the model does not"
    )
    what = "keep the first N values [what the model's folder says]"
    parser.add_argument("--truncate-dim", type=int, metavar="N", help=what)
    what = f"{', '.join(quantization.PRECISIONS)} [%(default)s]; int8 and uint8 by the ranges of all texts together"
    parser.add_argument("--precision", choices=quantization.PRECISIONS, default="float32", metavar="KIND", help=what)
    what = f"{SENTENCE}, or {TOKENS}: the last layer's rows [%(default)s]"
    parser.add_argument("--output-value", choices=(SENTENCE, TOKENS), default=SENTENCE, metavar="WHAT", help=what)
    _writing(parser, reading)
    _server(parser).set_defaults(run=commands.encode)


def _explore(parser: argparse.ArgumentParser) -> None:
    what = "where the page listens, on 127.0.0.1 alone; 0: any free port [%(default)s]"
    parser.add_argument("--port", type=int, default=0, metavar="N", help=what)
    what = "open the page in the browser, whose address is printed in any case [--browser]"
    parser.add_argument("--browser", action=argparse.BooleanOptionalAction, default=True, help=what)
    _server(parser, prints_json=False).set_defaults(run=commands.explore)


def _count(value: str) -> int:
    if (count := int(value)) < 1:
        raise argparse.ArgumentTypeError("it starts at 1")
    return count
