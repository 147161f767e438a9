"""Neighbours: sentences that are embedded once, in each layer, and those nearest to a query in each of them.

The vectors of one list at a time are held, in memory; those of the next replace them. Vectors that a file brought have
one layer: the one that they were made of.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from layertap import analysis
from layertap.errors import FailedPreconditionError, InvalidArgumentError
from layertap.explore import files, recipes
from layertap.explore.files import Held
from layertap.explore.messages import Message
from layertap.explore.requests import MAX_SENTENCES, Request
from layertap.explore.session import Session
from layertap.types import Pooling

_PROGRESS_STEP: Final = 50
_SHOWN: Final = 10


async def read_file(session: Session, request: Request) -> AsyncGenerator[Message, None]:
    """Yields the sentences of a file, and the names of its vectors, which are held."""
    name, data = request.file
    try:
        corpus = await asyncio.to_thread(files.read, name, data)
    except ModuleNotFoundError as exc:
        raise FailedPreconditionError(str(exc)) from exc
    session.file = corpus
    header = {"sentences": corpus.sentences, "has_texts": corpus.has_texts, "columns": list(corpus.vectors)}
    yield Message(header=header)


async def embed(session: Session, request: Request) -> AsyncGenerator[Message, None]:
    """Embeds sentences in each layer and yields how many are done; or takes the vectors of the file."""
    info = await session.info()
    poolings = request.poolings(info.layer_count)
    column = request.text("column")
    if column is not None:
        held = _of_file(session.file, column, poolings[-1], info.fingerprint)
        session.corpus = held
        yield _described(held, [])
        return
    sentences = request.strings("sentences", MAX_SENTENCES)
    matrices: list[list[npt.NDArray[Any]]] = []
    kept, bad = [], []
    arriving = session.client.embed_stream(sentences, pooling=poolings, **request.cut)
    async with contextlib.aclosing(arriving) as results:
        async for result in results:
            if result.error is None:
                matrices.append([pool[0] for pool in result.embedding.pools])
                kept.append(sentences[result.index])
            else:
                bad.append({"index": result.index, "details": str(result.error)})
            if (done := result.index + 1) % _PROGRESS_STEP == 0:
                yield Message(header={"done_count": done, "total": len(sentences)})
    if not kept:
        raise InvalidArgumentError(f"no sentence could be embedded; of the first: {bad[0]['details']}")
    session.corpus = Held(
        name=secrets.token_hex(8),
        sentences=tuple(kept),
        matrices=[np.stack([row[layer] for row in matrices]) for layer in range(len(poolings))],
        poolings=poolings,
    )
    yield _described(session.corpus, bad)


async def nearest(session: Session, request: Request) -> AsyncGenerator[Message, None]:
    """Yields the sentences nearest to a query in each layer, with their cosines."""
    held = session.corpus
    if held is None or request.text("corpus") != held.name:
        raise FailedPreconditionError("the sentences are no longer held; embed them again")
    query, cut = request.strings("texts", 2)[:1], request.cut
    if held.poolings is None:
        vectors = [np.asarray(await session.client.encode(query[0]))]
        asked = ["vectors = [client.encode(texts[0])]"]
    else:
        pools = await session.pools(query, held.poolings, cut)
        vectors = [pool[0] for pool in pools.pools]
        asked = ["vectors = [pool[0] for pool in client.embed(texts, pooling=poolings{options}).pools]"]
    if held.matrices[0].shape[1] != len(vectors[0]):
        raise InvalidArgumentError(
            f"the vectors of the file have {held.matrices[0].shape[1]} values, those of the query {len(vectors[0])}; "
            "choose the column and the pooling that belong together"
        )
    found = [
        analysis.nearest(matrix, vector, count=_SHOWN) for matrix, vector in zip(held.matrices, vectors, strict=True)
    ]
    positions, cosines = np.stack([order for order, _ in found]), np.stack([values for _, values in found])
    shown = {str(n): held.sentences[n] for n in np.unique(positions).tolist()}
    imports = "Client, Pooling, analysis"
    python = recipes.lines(session.target, query, *_lines(held, asked), cut=cut, imports=imports)
    header = {"sentences": shown, "layers": _layers(held), "python": python}
    yield Message(header=header, arrays={"positions": positions, "cosines": cosines})


def _lines(held: Held, asked: list[str]) -> list[str]:
    """Returns the lines that make the matrices, ask for the query, and compare."""
    if held.column is not None:
        made = [
            "import pyarrow.parquet as pq",
            f'column = pq.read_table("vectors.parquet").column({held.column!r}).combine_chunks()',
            f"matrices = [column.flatten().to_numpy().reshape(-1, {held.matrices[0].shape[1]})]",
            *(f"poolings = [{one!r}]" for one in held.poolings or ()),
        ]
    else:
        assert held.poolings is not None, "the page pools what it embeds"
        first, last = held.poolings[0], held.poolings[-1]
        made = [
            recipes.sentences(held.sentences),
            f"poolings = {recipes.poolings(first.strategy, cast('int', last.layer), first.include_special_tokens)}",
            "rows = [result.embedding.pools for result in client.embed_stream(sentences, pooling=poolings{options})]",
            "matrices = [[row[layer][0] for row in rows] for layer in range(len(poolings))]",
        ]
    return [
        *made,
        *asked,
        "found = [analysis.nearest(matrix, vector, count=10) for matrix, vector in zip(matrices, vectors)]",
        "positions, cosines = [order for order, _ in found], [values for _, values in found]",
    ]


def _layers(held: Held) -> list[int]:
    if held.poolings is None:
        return [-1]
    return [cast("int", one.layer) for one in held.poolings]


def _of_file(file: files.Corpus | None, column: str, pooling: Pooling, fingerprint: str) -> Held:
    """Returns the vectors of a column of the file.

    Raises:
        FailedPreconditionError: if there is no file, or its vectors are of another model.
        InvalidArgumentError: if it has no such column.
    """
    if file is None:
        raise FailedPreconditionError("the file is no longer held; choose it again")
    if column not in file.vectors:
        raise InvalidArgumentError(f"the file has no vectors {column}; there are {', '.join(file.vectors) or 'none'}")
    if file.fingerprint is not None and file.fingerprint != fingerprint:
        raise FailedPreconditionError(
            f"the vectors of the file are of the model {file.fingerprint[:12]}, the server has {fingerprint[:12]}; "
            "embed the texts again"
        )
    return Held(
        name=secrets.token_hex(8),
        sentences=tuple(file.sentences),
        matrices=[file.vectors[column]],
        poolings=None if column == files.ENCODED else [pooling],
        column=column,
    )


def _described(held: Held, bad: list[dict[str, Any]]) -> Message:
    facts = {"corpus": held.name, "sentence_count": len(held.sentences), "layers": _layers(held)}
    return Message(header={**facts, "bad": bad})
