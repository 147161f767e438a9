"""The commands: each asks the server, prints the answer or writes it to a file, and returns its exit code."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import threading
import webbrowser
from collections.abc import Sequence
from typing import Any, Final

import grpc
import numpy as np

from layertap import quantization
from layertap._transport.channel import open_channel
from layertap._transport.settings import resolve
from layertap._transport.status import translate
from layertap.cli import parsing
from layertap.cli.parsing import connect
from layertap.client import Client
from layertap.errors import LayertapError, counted
from layertap.jobs import JobError, shards
from layertap.jobs.destination import Destination
from layertap.jobs.items import BadItem, Content, Item
from layertap.jobs.job import Job
from layertap.jobs.readers import Lines, Source
from layertap.jobs.runner import answers
from layertap.jobs.shards import Shard
from layertap.jobs.tasks import OPTIONS, EmbedTask, EncodeTask, Task
from layertap.results.embedding import Embedding
from layertap.sentence_transformers import PromptedOptions
from layertap.types import Pooling

_VALUES_SHOWN: Final = 5
_HEALTH: Final = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")


def tokenize(args: argparse.Namespace) -> int:
    """Shows texts as the model's tokens."""
    texts: Any = list(map(_content, parsing.source(args).items()))
    if not texts:
        raise parsing.UsageError(parsing.NO_TEXT)
    with connect(args) as client:
        options = {name: getattr(args, name) for name in ("pad_to", "truncation", "max_length", "timeout_s")}
        tokens = client.tokenize(texts, add_special_tokens=not args.no_special_tokens, **options)
    names = ("input_ids", "attention_mask", "token_type_ids", "word_ids", "offset_mapping", "special_tokens_mask")
    for n, count in enumerate(tokens.token_counts):
        columns = {name: getattr(tokens, name)[n, :count].tolist() for name in names}
        if args.json:
            parsing.say_json(index=n, truncated=bool(tokens.truncated[n]), tokens=tokens.tokens[n], **columns)
            continue
        parsing.say("      id  mask  type  word    offsets  token")
        for piece, number, mask, kind, word, (start, end), _ in zip(tokens.tokens[n], *columns.values(), strict=True):
            parsing.say(f"{number:8}  {mask:4}  {kind:4}  {word:4}  {f'{start}:{end}':>9}  {piece}")
    return 0


def decode(args: argparse.Namespace) -> int:
    """Turns token ids back into text."""
    lines: Any = [" ".join(args.ids)] if args.ids else list(map(_content, Lines(path=None).items()))
    try:
        rows = list(map(parsing.token_ids, lines))
    except ValueError as exc:
        raise parsing.UsageError("something is no token id; ids are whole numbers with spaces or commas") from exc
    if not rows:
        raise parsing.UsageError("there are no ids; pass those of one text as arguments, or a text each line of stdin")
    with connect(args) as client:
        texts = client.decode(rows, skip_special_tokens=not args.keep_special_tokens, timeout_s=args.timeout_s)
    for n, text in enumerate(texts):
        parsing.say_json(index=n, text=text) if args.json else parsing.say(text)
    return 0


def info(args: argparse.Namespace) -> int:
    """Shows the served model and the limits."""
    with connect(args) as client:
        model = client.model_info(timeout_s=args.timeout_s)
    if args.json:
        parsing.say_json(**dataclasses.asdict(model))
        return 0
    for name, value in model.flat().items():
        parsing.say(f"{name:39}{value}")
    return 0


def health(args: argparse.Namespace) -> int:
    """Returns 0 if the server serves."""
    # The standard service without its package, which the client does not require. The empty request asks for the server
    # as a whole; the answer has one field, number 1, an enum: byte 0x08, then its value.
    with parsing.usage():
        connection = resolve(args.target, timeout_s=args.timeout_s)
    with open_channel(connection) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check", bytes, bytes)
        try:
            answer = check(b"", timeout=args.timeout_s)
        except grpc.RpcError as exc:
            error = translate(exc, connection, args.timeout_s)
            raise type(error)(f"{args.target} gave no health status: {error.details}") from exc
    status = _HEALTH[min(answer[1], 3) if answer[:1] == b"\x08" else 0]
    parsing.mention(f'{{"status": "{status}"}}' if args.json else status)
    return 0 if status == "SERVING" else 1


def explore(args: argparse.Namespace) -> int:
    """Serves the page that shows layers until it is interrupted."""
    from layertap.explore import server  # No other command needs it.

    def opened(address: str) -> None:
        parsing.mention(address)
        if args.browser:
            # A browser in a terminal returns only when it is left.
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()

    try:
        with parsing.usage():
            server.run(args.target, timeout_s=args.timeout_s, port=args.port, opened=opened)
    except OSError as exc:
        raise parsing.UsageError(f"port {args.port} cannot be opened: {exc.strerror}; choose another --port") from exc
    return 0


def embed(args: argparse.Namespace) -> int:
    """Shows layers, words and pooled vectors, or writes them to a file."""
    options: Any = {name: getattr(args, name) for name in OPTIONS} | {"pooling": _poolings(args)}
    return _answer(args, EmbedTask.of(options))


def encode(args: argparse.Namespace) -> int:
    """Shows sentence vectors, or writes them to a file."""
    options: PromptedOptions = {
        "prompt": args.prompt,
        "prompt_name": args.prompt_name,
        "normalize_embeddings": args.normalize,
        "truncate_dim": args.truncate_dim,
        "windows": args.windows,
    }
    return _answer(args, EncodeTask(options=options, output_value=args.output_value, precision=args.precision))


def _poolings(args: argparse.Namespace) -> list[Pooling] | None:
    more = {
        "layer": args.pooling_layer,
        "include_special_tokens": not args.pool_no_special_tokens,
        "normalize": args.normalize,
        "dimensions": args.dimensions,
    }
    if not args.pooling and Pooling("mean", **more) != Pooling("mean"):
        raise parsing.UsageError("there is no pooled vector to shape; choose one with --pooling")
    return [Pooling(strategy, **more) for strategy in args.pooling] if args.pooling else None


def _answer(args: argparse.Namespace, task: Task) -> int:
    if (found := parsing.shards(args)) is not None:
        return _write_shards(args, found, task)
    source = parsing.source(args)
    if args.output:
        destination = Destination(output=args.output, overwrite=args.overwrite)
        with connect(args) as client:
            return _write(args, client, _job(args, source, destination, task))
    if args.keep:
        raise parsing.UsageError("--keep carries fields to a file; name it with -o")
    return _show(args, source, task)


def _job(args: argparse.Namespace, source: Source, destination: Destination, task: Task) -> Job:
    return Job(
        source=source,
        destination=destination,
        task=task,
        fields=parsing.fields(args),
        input_format=args.input_format,
        part_items=args.part_texts,
        timeout_s=args.timeout_s,
        warn=parsing.warn,
    )


def _write_shards(args: argparse.Namespace, found: Sequence[Shard], task: Task) -> int:
    """Does one file after the other; one that fails does not stop the others."""
    if task.precision.endswith("int8"):
        raise parsing.UsageError(f"--precision {task.precision} takes the ranges of one file; name one file with -o")
    shards.prepare(args.output)
    if not found:
        parsing.warn("no file falls to this share")
    failed, code = 0, 0
    with connect(args) as client:
        for shard in found:
            try:
                source, destination = parsing.reader(args, shard.source), shard.destination(overwrite=args.overwrite)
                code = max(code, _write(args, client, _job(args, source, destination, task)))
            except (JobError, OSError) as exc:
                if isinstance(exc, OSError) and str(exc.filename) != str(shard.source):
                    raise  # It would end the next ones too: the disk is full, or the server's socket is gone.
                failed += 1
                parsing.warn(parsing.reason(exc))
    if failed:
        parsing.warn(f"{failed} of {counted(len(found), 'file')} failed; the same command does what is left")
    return 1 if failed else code


def _write(args: argparse.Namespace, client: Client, job: Job) -> int:
    output, errors = job.destination.output, job.destination.errors
    try:
        outcome = job.run(client, shown=args.progress)
    except (KeyboardInterrupt, LayertapError, OSError):
        if count := job.kept_count():
            folder = job.destination.folder
            parsing.warn(f"{counted(count, 'finished item')} in {folder}; the same command goes on from there")
        raise
    if outcome.bad_count:
        failed = counted(outcome.bad_count, "item")
        parsing.warn(f"{failed} failed; {errors} has the reasons{', the first:' if outcome.reasons else ''}")
        for reason in outcome.reasons:
            parsing.warn(reason)
    if args.json:
        bad = {"bad_count": outcome.bad_count, "errors": str(errors) if outcome.bad_count else None}
        facts = {"path": str(output), "text_count": outcome.text_count, **bad, "shapes": outcome.shapes}
        parsing.mention(parsing.to_json(facts))
    elif outcome.was_done:
        parsing.mention(f"{output}: {counted(outcome.text_count, 'text')}, was done before")
    elif outcome.text_count:
        shapes = (f"{name} {list(shape)}" for name, shape in outcome.shapes.items())
        parsing.mention(f"{output}: {counted(outcome.text_count, 'text')}, {', '.join(shapes)}")
    if not outcome.text_count:
        parsing.warn(f"there is no good item, so {output} is not written")
        return 1 if job.destination.work_folder is None else parsing.SOME_ARE_BAD * bool(outcome.bad_count)
    return parsing.SOME_ARE_BAD if outcome.bad_count else 0


def _show(args: argparse.Namespace, source: Source, task: Task) -> int:
    count = bad_count = 0
    # Ranges are those of all texts, so nothing can be shown before the last one.
    by_range, held = task.precision.endswith("int8"), []
    with connect(args) as client:
        task.begin(client.model_info(timeout_s=args.timeout_s))
        with contextlib.closing(answers(client, source.items(), task=task, timeout_s=args.timeout_s)) as found:
            for count, answer in enumerate(found, 1):
                if isinstance(answer.embedding, BadItem):
                    bad_count += 1
                    parsing.warn(f"item {answer.embedding.number}: {answer.embedding.reason}")
                    continue
                facts = {"index": count - 1, "id": answer.item.id, "token_count": int(answer.embedding.token_counts[0])}
                facts["truncated"] = bool(answer.embedding.truncated[0])
                arrays = _arrays(task, answer.embedding)
                if by_range:
                    held.append((facts, arrays))
                else:
                    _print(args, facts, arrays)
    if held:
        (name,) = held[0][1]
        rows = [np.atleast_2d(arrays[name]) for _, arrays in held]
        matrices = quantization.quantize_matrices(rows, precision=task.precision)
        for (facts, arrays), matrix in zip(held, matrices, strict=True):
            _print(args, facts, {name: matrix.reshape(arrays[name].shape)})
    if not count:
        raise parsing.UsageError(parsing.NO_TEXT)
    return parsing.SOME_ARE_BAD if bad_count else 0


def _arrays(task: Task, embedding: Embedding) -> dict[str, Any]:
    """Returns the rows of one text; in bits if the task wants bits, which no other text decides."""
    columns = [one for one in task.columns(embedding) if np.ndim(one.values) > 1]
    arrays = {one.name: np.asarray(one.values if one.counts is not None else one.values[0]) for one in columns}
    if not task.precision.endswith("binary"):
        return arrays
    return {name: quantization.quantize_embeddings(one, precision=task.precision) for name, one in arrays.items()}


def _print(args: argparse.Namespace, facts: dict[str, Any], arrays: dict[str, Any]) -> None:
    if args.json:
        parsing.say_json(**facts, **{name: array.tolist() for name, array in arrays.items()})
        return
    parsing.say(f"text {facts['id']}: {counted(facts['token_count'], 'token')}{' (cut)' if facts['truncated'] else ''}")
    width = max(map(len, arrays))
    for name, array in arrays.items():
        values = [f"{value:8.4f}" if array.dtype.kind == "f" else f"{value:4}" for value in array.flat[:_VALUES_SHOWN]]
        rest = ["…"] if array.size > _VALUES_SHOWN else []
        parsing.say(" ".join([f"  {name:{width}} {array.shape!s:10}", *values, *rest]))


def _content(item: Item | BadItem) -> Content:
    """Returns the text of an item, or its words; a bad one ends the command."""
    if isinstance(item, BadItem):
        raise parsing.UsageError(f"item {item.number}: {item.reason}")
    return item.content
