"""The commands that ask one question: tokenize, decode, info and health."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Final

import grpc

from layertap._transport.channel import open_channel, translate
from layertap._transport.settings import settle
from layertap.cli import parsing
from layertap.client import Client
from layertap.jobs.readers import BadItem

_HEALTH: Final = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")


def tokenize(args: argparse.Namespace) -> int:
    """Shows texts as the model's tokens."""
    texts = []
    for item in parsing.source(args).items():
        if isinstance(item, BadItem):
            raise parsing.UsageError(f"item {item.number}: {item.reason}")
        texts.append(item.content)
    if not texts:
        raise parsing.UsageError(parsing.NO_TEXT)
    with Client(args.target) as client:
        options = {name: getattr(args, name) for name in ("pad_to", "truncation", "max_length", "timeout_s")}
        tokens = client.tokenize(texts, add_special_tokens=not args.no_special_tokens, **options)
    names = ("input_ids", "attention_mask", "token_type_ids", "word_ids", "offset_mapping", "special_tokens_mask")
    for n, count in enumerate(tokens.token_counts):
        columns = {name: getattr(tokens, name)[n, :count].tolist() for name in names}
        if args.json:
            parsing.print_json(index=n, truncated=bool(tokens.truncated[n]), tokens=tokens.tokens[n], **columns)
            continue
        print("      id  mask  type  word    offsets  token")
        for piece, number, mask, kind, word, (start, end), _ in zip(tokens.tokens[n], *columns.values(), strict=True):
            print(f"{number:8}  {mask:4}  {kind:4}  {word:4}  {f'{start}:{end}':>9}  {piece}")
    return 0


def decode(args: argparse.Namespace) -> int:
    """Turns token ids back into text."""
    try:
        rows = [parsing.token_ids(" ".join(args.ids))] if args.ids else [parsing.token_ids(line) for line in sys.stdin]
    except ValueError as exc:
        raise parsing.UsageError("something is no token id; ids are whole numbers, apart by spaces or commas") from exc
    if not rows:
        raise parsing.UsageError("there are no ids; pass those of one text as arguments, or a text each line of stdin")
    with Client(args.target) as client:
        texts = client.decode(rows, skip_special_tokens=not args.keep_special_tokens, timeout_s=args.timeout_s)
    for n, text in enumerate(texts):
        parsing.print_json(index=n, text=text) if args.json else print(text)
    return 0


def info(args: argparse.Namespace) -> int:
    """Shows the served model and the limits."""
    with Client(args.target) as client:
        facts = dataclasses.asdict(client.model_info(timeout_s=args.timeout_s))
    if args.json:
        parsing.print_json(**facts)
        return 0
    facts |= facts.pop("limits")
    facts |= {f"sentences.{name}": value for name, value in facts.pop("sentence_config").items()}
    for name, value in facts.items():
        print(f"{name:30}", *(value if isinstance(value, tuple) else [value]))
    return 0


def health(args: argparse.Namespace) -> int:
    """Ends with 0 if the server serves."""
    # The standard service without its package, which the client does not require. The empty request asks for the server
    # as a whole; the answer has one field, number 1, an enum: byte 0x08, then its value.
    connection = settle(args.target, timeout_s=args.timeout_s)
    with open_channel(connection) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check", bytes, bytes)
        try:
            answer = check(b"", timeout=args.timeout_s)
        except grpc.RpcError as exc:
            error = translate(exc, connection, args.timeout_s)
            raise type(error)(f"{args.target} does not tell its health: {error.details}") from exc
    status = _HEALTH[min(answer[1], 3) if answer[:1] == b"\x08" else 0]
    parsing.print_json(status=status) if args.json else print(status)
    return 0 if status == "SERVING" else 1
