"""The command `layertap`: tokenize, decode, embed, info and health from a shell.

Rules: answers go to stdout, one line on what went wrong to stderr; 0 is success, 1 an error or an unhealthy server, 2
wrong usage. With `--json` each answer is one JSON object on a line of its own. `embed` sends texts as they are read, so
a pipe may bring any number. Knows no more of the server than any user of `Client` does.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import grpc
import numpy as np

from layertap import __version__, wire
from layertap.calls import DEFAULT_TIMEOUT_S
from layertap.channel import DEFAULT_TARGET
from layertap.client import Client
from layertap.errors import LayertapError, from_status
from layertap.types import FloatArray

_EXAMPLES: Final = """\
examples:
  layertap tokenize 'I love Paris' --pad-to 7
  layertap embed 'I love Paris' --layers all
  layertap embed --pooling mean --json < texts.txt
  layertap embed --layers=-1,-2 --pooler-output -o out.npz < texts.txt
  layertap decode 101 1045 2293 3000 102
  layertap health --target 10.0.0.7:50051 && layertap info --target 10.0.0.7:50051

Texts are arguments or, without any, lines of stdin; an empty line is a text. Before a text that begins with a dash
write --, before negative layers = (--layers=-1,-2). LAYERTAP_TARGET replaces the default of --target.

exit codes: 0 done; 1 the server refused, failed, did not answer or is not serving; 2 wrong usage."""

_NO_TEXT: Final = "there is no text; pass some as arguments, or as lines of stdin"
_EMBED_OPTIONS: Final = ("layers", "pooler_output", "pooling", "dtype", "truncation", "max_length")
_HEALTH: Final = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")


class _UsageError(Exception):
    """The command cannot be meant as it stands."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    args = _parser().parse_args(argv)
    wire.keep_pages()
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read us has left, as `head` does; nothing may be flushed into the pipe when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except UnicodeError:
        code, message = 1, "stdin or stdout is not UTF-8; convert the text, or set PYTHONUTF8=1"
    except (_UsageError, LayertapError, OSError) as exc:
        code, message = 2 if isinstance(exc, _UsageError) else 1, str(exc)
    print(f"layertap: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    target = os.environ.get("LAYERTAP_TARGET") or DEFAULT_TARGET
    common.add_argument("--target", default=target, help="the server, as host:port [%(default)s]")
    common.add_argument("--timeout-s", type=float, default=DEFAULT_TIMEOUT_S, help="wait so long for an answer [60]")
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
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    tokenize = commands.add_parser("tokenize", parents=[texts, common], help="show texts as the model's tokens")
    tokenize.add_argument("--pad-to", type=int, help="pad each text to so many tokens")
    tokenize.add_argument("--no-special-tokens", action="store_true", help="leave [CLS] and [SEP] out")
    tokenize.set_defaults(run=_tokenize)

    decode = commands.add_parser("decode", parents=[common], help="turn token ids back into text")
    decode.add_argument("ids", nargs="*", metavar="ID", help="the ids of one text; none: a text each line")
    decode.add_argument("--keep-special-tokens", action="store_true", help="show [CLS], [SEP] and [PAD] too")
    decode.set_defaults(run=_decode)

    embed = commands.add_parser("embed", parents=[texts, common], help="get layers, pooler output and pooled vectors")
    embed.add_argument("--layers", type=_layers, help="all, or numbers such as 0,6 or =-1,-2 [last, if nothing else]")
    embed.add_argument("--pooling", action="append", choices=wire.POOLING_STRATEGIES, help="may be given several times")
    embed.add_argument("--pooler-output", action="store_true", help="the model's own pooler")
    embed.add_argument("--dtype", choices=wire.DTYPES, default="float32", help="on the wire [%(default)s]")
    contents = "write all numbers to a new file: token_counts, layer_K (ragged rows), pool_N, pooler_output"
    embed.add_argument("-o", "--output", type=Path, metavar="OUT.npz", help=contents)
    embed.set_defaults(run=_embed)
    commands.add_parser("info", parents=[common], help="show the served model and the limits").set_defaults(run=_info)
    commands.add_parser("health", parents=[common], help="exit with 0 if the server serves").set_defaults(run=_health)
    return parser


def _tokenize(args: argparse.Namespace) -> int:
    if not (texts := list(_texts(args))):
        raise _UsageError(_NO_TEXT)
    with Client(args.target) as client:
        options = {name: getattr(args, name) for name in ("pad_to", "truncation", "max_length", "timeout_s")}
        tokens = client.tokenize(texts, add_special_tokens=not args.no_special_tokens, **options)
    names = ("input_ids", "attention_mask", "token_type_ids", "word_ids", "offset_mapping", "special_tokens_mask")
    for n, count in enumerate(tokens.token_counts):
        columns = {name: getattr(tokens, name)[n, :count].tolist() for name in names}
        if args.json:
            _print_json(index=n, truncated=bool(tokens.truncated[n]), tokens=tokens.tokens[n], **columns)
            continue
        print("      id  mask  type  word    offsets  token")
        for piece, number, mask, kind, word, (start, end), _ in zip(tokens.tokens[n], *columns.values(), strict=True):
            print(f"{number:8}  {mask:4}  {kind:4}  {word:4}  {f'{start}:{end}':>9}  {piece}")
    return 0


def _decode(args: argparse.Namespace) -> int:
    try:
        rows = [_ids(" ".join(args.ids))] if args.ids else [_ids(line) for line in sys.stdin]
    except ValueError as exc:
        raise _UsageError("something is no token id; ids are whole numbers, apart by spaces or commas") from exc
    if not rows:
        raise _UsageError("there are no ids; pass those of one text as arguments, or a text each line of stdin")
    with Client(args.target) as client:
        texts = client.decode(rows, skip_special_tokens=not args.keep_special_tokens, timeout_s=args.timeout_s)
    for n, text in enumerate(texts):
        _print_json(index=n, text=text) if args.json else print(text)
    return 0


def _embed(args: argparse.Namespace) -> int:
    kept: list[dict[str, FloatArray]] = []
    token_counts: list[int] = []
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_new_file(args.output)) if args.output else None
        client = stack.enter_context(Client(args.target))
        client.model_info(timeout_s=args.timeout_s)  # A stream goes on looking for its server; this fails at once.
        options = {name: getattr(args, name) for name in _EMBED_OPTIONS}
        options |= {"on_error": "raise", "item_timeout_s": args.timeout_s, "reconnect_timeout_s": args.timeout_s}
        for result in client.embed_stream(_texts(args), **options):
            embedding = result.embedding
            token_counts.append(int(embedding.token_counts[0]))
            arrays = {f"layer_{k}": embedding.ragged(k)[0] for k in embedding.layers}
            arrays |= {f"pool_{n}": pool[0] for n, pool in enumerate(embedding.pools)}
            if args.pooler_output:
                arrays["pooler_output"] = embedding.pooler_output[0]
            if file:
                kept.append(arrays)
            elif args.json:
                facts = {"token_count": token_counts[-1], "truncated": bool(embedding.truncated[0])}
                _print_json(index=result.index, **facts, **{name: array.tolist() for name, array in arrays.items()})
            else:
                print(f"text {result.index}: {token_counts[-1]} tokens{' (cut)' if embedding.truncated[0] else ''}")
                for name, array in arrays.items():
                    print(f"  {name:13} {array.shape!s:10}", *(f"{value:8.4f}" for value in array.flat[:5]), "…")
        if not token_counts:
            raise _UsageError(_NO_TEXT)
        joined: dict[str, Any] = {"token_counts": np.array(token_counts)}
        if file:
            joined |= {name: np.concatenate([np.atleast_2d(one[name]) for one in kept]) for name in kept[0]}
            np.savez(file, **joined)
    if args.output:
        shapes = {name: list(array.shape) for name, array in joined.items()}
        text = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        _print_json(path=str(args.output), shapes=shapes) if args.json else print(f"{args.output}: {text}")
    return 0


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that is not there yet, and takes it away again if what was to be written fails."""
    if path.suffix != ".npz":
        raise _UsageError("--output must end in .npz")
    try:
        file = path.open("xb")
    except FileExistsError as exc:
        raise _UsageError(f"{path} is there already; name another file, or remove it") from exc
    try:
        with file:
            yield file
    except BaseException:
        path.unlink()
        raise


def _info(args: argparse.Namespace) -> int:
    with Client(args.target) as client:
        info = dataclasses.asdict(client.model_info(timeout_s=args.timeout_s))
    if args.json:
        _print_json(**info)
        return 0
    for name, value in (info | info.pop("limits")).items():
        print(f"{name:26}", *(value if isinstance(value, tuple) else [value]))
    return 0


def _health(args: argparse.Namespace) -> int:
    # The standard service without its package, which the client does not require. The empty request asks for the server
    # as a whole; the answer has one field, number 1, an enum: byte 0x08, then its value.
    with grpc.insecure_channel(args.target) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check", bytes, bytes)
        try:
            answer = check(b"", timeout=args.timeout_s)
        except grpc.RpcError as exc:
            message = f"{args.target} does not tell its health: {exc.details()}"
            raise from_status(exc.code().value[0], message) from exc
    status = _HEALTH[min(answer[1], 3) if answer[:1] == b"\x08" else 0]
    _print_json(status=status) if args.json else print(status)
    return 0 if status == "SERVING" else 1


def _texts(args: argparse.Namespace) -> Iterator[str]:
    return iter(args.texts) if args.texts else (line.removesuffix("\n") for line in sys.stdin)


def _layers(value: str) -> str | list[int]:
    try:
        return value if value == "all" else [int(part) for part in value.split(",")]
    except ValueError as exc:
        raise argparse.ArgumentTypeError("pass all, or numbers such as 0,6 or =-1,-2") from exc


def _ids(value: str) -> list[int]:
    return [int(part) for part in value.replace(",", " ").split()]


def _print_json(**fields: Any) -> None:
    print(json.dumps(fields))


if __name__ == "__main__":
    sys.exit(main())
