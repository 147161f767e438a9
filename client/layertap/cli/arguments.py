"""The arguments of the command line, and what `--help` says below them."""

from __future__ import annotations

import argparse
import functools
import os
from pathlib import Path
from typing import Final

from layertap import __version__, quantization, wire
from layertap._transport.settings import DEFAULT_TARGET
from layertap.cli import commands, completion, parsing
from layertap.jobs import shards
from layertap.jobs.job import DEFAULT_PART_ITEMS
from layertap.jobs.readers import FORMATS
from layertap.sentence_transformers import SENTENCE, TOKENS

_EXPLORE: Final = """\
examples:
  layertap explore
  layertap explore --target gpu-box:50051 --no-browser

The page shows tokens, layers as they arrive, how tokens change, likeness, maps, attentions and neighbours, live. It
needs the extra explore. Ctrl-C ends it."""

_TOKENIZE: Final = """\
examples:
  layertap tokenize 'I love Paris' --pad-to 7
  layertap tokenize --json < texts.txt"""

_DECODE: Final = """\
examples:
  layertap decode 101 1045 2293 3000 102
  layertap decode --keep-special-tokens < ids.txt"""

_FILES: Final = """

OUT is made from parts in the folder OUT.parts, which is removed at the end. If the command is interrupted, the same
command resumes after the last part and makes the same OUT. It refuses other settings, another model, and an input that
has changed where it was done. Parts that are damaged are done again. Items that fail do not stop the others; the side
file OUT.errors.jsonl has the number, id, code and reason of each."""

_EMBED: Final = (
    """\
examples:
  layertap embed 'I love Paris' --layers all
  layertap embed --pooling mean --json < texts.txt
  layertap embed corpus.txt --layers=-1,-2 --pooler-output -o out.npz
  layertap embed corpus.jsonl.gz --id-field id --keep title,url --pooling mean -o out.parquet
  layertap embed corpus.jsonl --words mean --mix mean:-4,-3,-2,-1 -o out.arrow
  layertap embed 'corpus/*.parquet' --pooling mean --shard 3/100 -o vectors
  zstdcat corpus.jsonl.zst | layertap embed --input-format jsonl --pooling cls -o out.safetensors

OUT holds ids, kept fields, token_counts, truncated, and what was requested: layer_K, mixed, words_layer_K,
words_mixed, attentions_K, pool_N, pooler_output. Rows of tokens and words lie one text after the other in .npz and
.safetensors (divide them by token_counts and word_counts), in lists in .parquet and .arrow; attentions_K has a row for
each pair of tokens, with a value for each head. .npy holds one matrix with a row a text, and no ids."""
    + _FILES
)

_ENCODE: Final = (
    """\
examples:
  layertap encode 'I love Paris' --json
  layertap encode corpus.jsonl --id-field id -o out.parquet
  layertap encode queries.txt --prompt-name query --normalize -o queries.npy
  layertap encode corpus.csv --text-field body --precision int8 -o out.npz

One vector a text, as Client.encode and sentence-transformers make it: the model's folder says how texts are pooled,
normalized, cut and prompted. OUT holds ids, kept fields, token_counts, truncated, and sentence_embedding or
token_embeddings."""
    + _FILES
)

_INFO: Final = """\
example:
  layertap info --target 10.0.0.7:50051"""

_HEALTH: Final = """\
example:
  layertap health --timeout-s 2 || echo 'not serving'"""

_COMPLETION: Final = """\
bash, in ~/.bashrc:
  source <(layertap completion bash)

zsh, in ~/.zshrc:
  source <(layertap completion zsh)

The script is fixed once it is made: a file that it is written to starts faster than the command."""

_ALL: Final = """\
examples:
  layertap tokenize 'I love Paris'
  layertap embed 'I love Paris' --layers all
  layertap embed corpus.txt --pooling mean -o out.npz
  layertap encode corpus.jsonl -o out.parquet
  layertap decode 101 1045 2293 3000 102
  layertap health && layertap info
  layertap embed --help

Texts are arguments, the lines of a file, or lines of stdin; an empty line is a text. An argument that looks like a file
is one; --text says that it is a text. Before a text that begins with a dash write --, before negative layers =
(--layers=-1,-2). What a command's help has in brackets is the default. LAYERTAP_TARGET and LAYERTAP_TIMEOUT_S replace
those of the server; LAYERTAP_TLS_CA, LAYERTAP_TLS_CERT, LAYERTAP_TLS_KEY and LAYERTAP_TOKEN encrypt and identify.

exit codes:
  0    done; health: the server serves
  1    the server refused, failed, did not answer or is not serving; or a file cannot be read or written
  2    wrong usage, or a file would be lost
  3    done, but some items failed
  130  Ctrl-C
  141  the reader of stdout closed it"""


def build() -> argparse.ArgumentParser:
    """Returns the parser; what it parses has the command as `run`."""
    parser = argparse.ArgumentParser(
        prog="layertap",
        description="Tokens, pooled vectors and every layer of a BERT, from a layertap server.",
        epilog=_ALL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"layertap {__version__}")
    commands_of = parser.add_subparsers(required=True, metavar="COMMAND", title="commands (each has its own --help)")

    def command(name: str, summary: str, examples: str) -> argparse.ArgumentParser:
        return commands_of.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    _tokenize(command("tokenize", "show texts as the model's tokens", _TOKENIZE))
    _decode(command("decode", "turn token ids back into text", _DECODE))
    _embed(command("embed", "get layers, pooler output and pooled vectors", _EMBED))
    _encode(command("encode", "get one vector a text, as sentence-transformers does", _ENCODE))
    _server(command("info", "show the served model and the limits", _INFO)).set_defaults(run=commands.info)
    _server(command("health", "exit with 0 if the server serves", _HEALTH)).set_defaults(run=commands.health)
    _explore(command("explore", "open a page in the browser that shows what the model does with a sentence", _EXPLORE))
    completing = command("completion", "print a script that completes commands and flags in a shell", _COMPLETION)
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
    what = "all, or numbers such as 0,6 or =-1,-2 [the last, if nothing else is requested]"
    parser.add_argument("--layers", type=parsing.layers, help=what)
    what = f"one row a word instead of a token: {', '.join(wire.WORD_POOLINGS)} of its tokens' rows"
    parser.add_argument("--words", choices=wire.WORD_POOLINGS, metavar="POOLING", help=what)
    what = "several layers as one, such as mean:-4,-3,-2,-1 or concat:-1,-2 or weighted:0,6:0.5,2"
    parser.add_argument("--mix", type=parsing.mix, help=what)
    what = "attention probabilities of encoder blocks: all, or numbers such as 0,5 or =-1; they grow with length²"
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
    what = "open the page in the browser; its address is printed either way [%(default)s]"
    parser.add_argument("--browser", action=argparse.BooleanOptionalAction, default=True, help=what)
    _server(parser, prints_json=False).set_defaults(run=commands.explore)


def _count(value: str) -> int:
    if (count := int(value)) < 1:
        raise argparse.ArgumentTypeError("it starts at 1")
    return count
