"""The command embed: layers, pooler output and pooled vectors of texts, shown or written to a file."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from layertap.cli import shell
from layertap.client import Client
from layertap.types import FloatArray

_EMBED_OPTIONS: Final = ("layers", "pooler_output", "pooling", "dtype", "truncation", "max_length")


def embed(args: argparse.Namespace) -> int:
    """Shows what the model makes of texts, or writes it to a file."""
    kept: list[dict[str, FloatArray]] = []
    token_counts: list[int] = []
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_new_file(args.output)) if args.output else None
        client = stack.enter_context(Client(args.target))
        client.model_info(timeout_s=args.timeout_s)  # A stream goes on looking for its server; this fails at once.
        options = {name: getattr(args, name) for name in _EMBED_OPTIONS}
        options |= {"on_error": "raise", "item_timeout_s": args.timeout_s, "reconnect_timeout_s": args.timeout_s}
        for result in client.embed_stream(shell.texts(args), **options):
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
                shell.print_json(
                    index=result.index, **facts, **{name: array.tolist() for name, array in arrays.items()}
                )
            else:
                print(f"text {result.index}: {token_counts[-1]} tokens{' (cut)' if embedding.truncated[0] else ''}")
                for name, array in arrays.items():
                    print(f"  {name:13} {array.shape!s:10}", *(f"{value:8.4f}" for value in array.flat[:5]), "…")
        if not token_counts:
            raise shell.UsageError(shell.NO_TEXT)
        joined: dict[str, Any] = {"token_counts": np.array(token_counts)}
        if file:
            joined |= {name: np.concatenate([np.atleast_2d(one[name]) for one in kept]) for name in kept[0]}
            np.savez(file, **joined)
    if args.output:
        shapes = {name: list(array.shape) for name, array in joined.items()}
        text = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        shell.print_json(path=str(args.output), shapes=shapes) if args.json else print(f"{args.output}: {text}")
    return 0


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that is not there yet, and takes it away again if what was to be written fails."""
    if path.suffix != ".npz":
        raise shell.UsageError("--output must end in .npz")
    try:
        file = path.open("xb")
    except FileExistsError as exc:
        raise shell.UsageError(f"{path} is there already; name another file, or remove it") from exc
    try:
        with file:
            yield file
    except BaseException:
        path.unlink()
        raise
