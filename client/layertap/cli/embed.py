"""The command embed: layers, pooler output and pooled vectors of texts, shown on stdout or written to a file."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any, Final

import numpy as np

from layertap.cli import parsing
from layertap.client import Client
from layertap.errors import LayertapError
from layertap.jobs.job import Job
from layertap.jobs.readers import BadItem, Source
from layertap.jobs.runner import Answers
from layertap.results.embedding import Embedding
from layertap.types import Pooling

_ASKED: Final = (
    *("layers", "words", "mix", "pooler_output", "dtype", "truncation", "max_length"),
    *("prompt", "prompt_name"),
)
_READ: Final = ("text_field", "id_field", "input_format")


def embed(args: argparse.Namespace) -> int:
    """Shows what the model makes of texts, or writes it to a file."""
    source = parsing.source(args)
    options = {name: getattr(args, name) for name in _ASKED} | {"pooling": _poolings(args)}
    return _write(args, source, options) if args.output else _show(args, source, options)


def _poolings(args: argparse.Namespace) -> list[Pooling] | None:
    more = {
        "layer": args.pooling_layer,
        "include_special_tokens": not args.pool_no_special_tokens,
        "normalize": args.normalize,
        "dimensions": args.dimensions,
    }
    if not args.pooling and Pooling("mean", **more) != Pooling("mean"):
        raise parsing.UsageError("there is no vector to shape; say which with --pooling")
    return [Pooling(strategy, **more) for strategy in args.pooling] if args.pooling else None


def _write(args: argparse.Namespace, source: Source, options: dict[str, Any]) -> int:
    job = Job(
        source=source,
        output=args.output,
        options=options,
        reading={name: getattr(args, name) for name in _READ},
        overwrite=args.overwrite,
        part_items=args.part_texts,
        timeout_s=args.timeout_s,
    )
    try:
        with Client(args.target) as client:
            outcome = job.run(client, shown=args.progress)
    except (KeyboardInterrupt, LayertapError, OSError):
        if job.folder.is_dir():
            parsing.warn(
                f"{job.kept_count} items are done and lie in {job.folder}; the same command goes on from there"
            )
        raise
    if outcome.bad_count:
        parsing.warn(f"{outcome.bad_count} items could not be embedded; {job.errors} says why")
    if args.json:
        bad = {"bad_count": outcome.bad_count, "errors": str(job.errors) if outcome.bad_count else None}
        parsing.print_json(path=str(job.output), text_count=outcome.text_count, **bad, shapes=outcome.shapes)
    elif outcome.text_count:
        shapes = (f"{name} {list(shape)}" for name, shape in outcome.shapes.items())
        print(f"{job.output}: {outcome.text_count} texts,", ", ".join(shapes))
    if not outcome.text_count:
        parsing.warn(f"there is no good item, so {job.output} is not written")
        return 1
    return parsing.SOME_ARE_BAD if outcome.bad_count else 0


def _show(args: argparse.Namespace, source: Source, options: dict[str, Any]) -> int:
    count = bad_count = 0
    with Client(args.target) as client:
        client.model_info(timeout_s=args.timeout_s)  # A stream goes on looking for its server; this fails at once.
        answers = Answers(client, options=options, timeout_s=args.timeout_s)
        with contextlib.closing(answers.of(source.items())) as found:
            for count, answer in enumerate(found, 1):
                if isinstance(answer.embedding, BadItem):
                    bad_count += 1
                    parsing.warn(f"item {answer.embedding.number}: {answer.embedding.reason}")
                else:
                    _print(args, count - 1, answer.item.id, answer.embedding)
    if not count:
        raise parsing.UsageError(parsing.NO_TEXT)
    return parsing.SOME_ARE_BAD if bad_count else 0


def _print(args: argparse.Namespace, index: int, identity: int | str | None, embedding: Embedding) -> None:
    token_count, truncated = int(embedding.token_counts[0]), bool(embedding.truncated[0])
    vectors = [column for column in embedding.columns() if np.ndim(column.values) > 1]
    arrays = {one.name: np.asarray(one.values if one.counts is not None else one.values[0]) for one in vectors}
    if args.json:
        facts = {"index": index, "id": identity, "token_count": token_count, "truncated": truncated}
        parsing.print_json(**facts, **{name: array.tolist() for name, array in arrays.items()})
        return
    print(f"text {identity}: {token_count} tokens{' (cut)' if truncated else ''}")
    for name, array in arrays.items():
        print(f"  {name:13} {array.shape!s:10}", *(f"{value:8.4f}" for value in array.flat[:5]), "…")
