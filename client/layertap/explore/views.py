"""The views of the page: each asks the server what its picture needs, and answers with numbers and their Python.

Numbers are those of the SDK and of `analysis`; the page draws them and computes none. All but `layers` answer with one
message. Names in arrays that end with _0 and _1 are of the first and the second text.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator
from typing import Any, Final

import numpy as np

from layertap import analysis
from layertap.explore import recipes
from layertap.explore.messages import Message
from layertap.explore.requests import MAX_COPIES, Request
from layertap.explore.session import Session
from layertap.results.embedding import Embedding
from layertap.results.tokens import Tokens
from layertap.types import TokenIds

_GRID_CELLS: Final = 24
"""Cells along each side of a small picture of one head. Of longer texts a cell is the largest of a block."""

_FACTS: Final = (
    *("model_id", "model_type", "fingerprint", "layer_count", "hidden_size", "attention_head_count", "max_length"),
    *("compute_dtype", "devices", "server_version", "has_pooler_output"),
)


async def info(session: Session, request: Request) -> AsyncGenerator[Message, None]:
    """Yields which model is served."""
    facts = await session.info()
    yield Message(header={"target": session.target, **{name: getattr(facts, name) for name in _FACTS}})


async def tokens(session: Session, request: Request) -> AsyncGenerator[Message, None]:
    """Yields the tokens of texts, and how far padding and masks move their rows."""
    texts, cut, masks = request.texts, request.cut, request.masks
    pad_to, has_special = request.number("pad_to"), request.flag("special_tokens", True)
    found = await session.client.tokenize(texts, **cut, pad_to=pad_to, add_special_tokens=has_special)
    rest = [recipes.tokens(pad_to, has_special)]
    arrays: dict[str, Any] = {}
    if masks is not None or pad_to is not None:
        used = masks or [one.attention_mask[0].tolist() for one in found]
        plain = [_ids(one, int(one.attention_mask.sum())) for one in found]
        altered = [dataclasses.replace(_ids(one), attention_mask=used[n]) for n, one in enumerate(found)]
        before = await session.client.embed(plain, layers="all")
        after = await session.client.embed(altered, layers="all")
        for n in range(len(texts)):
            arrays[f"cosine_{n}"], arrays[f"difference_{n}"] = analysis.differences(before, after, text=n)
        rest += [f"masks = {used!r}", *recipes.DIFFERENCES]
    python = recipes.lines(session.target, texts, *rest, cut=cut, imports="Client, TokenIds, analysis")
    rows = [_token_table(one) for one in found]
    yield Message(header={"tokens": rows, "python": python}, arrays=arrays)


async def layers(session: Session, request: Request) -> AsyncGenerator[Message, None]:
    """Yields the rows of layers as they arrive, with the time since the request in milliseconds."""
    texts, cut, copies = request.texts, request.cut, request.number("copies", most=MAX_COPIES) or 1
    found = await session.client.tokenize(texts, **cut)
    python = recipes.lines(
        session.target,
        texts,
        "began = time.perf_counter()",
        f'for part in client.embed_layers(texts * {copies}, layers="all"' + "{options}):",
        "    print(part.layer, part.texts, f'{(time.perf_counter() - began) * 1000:.1f} ms', part.rows[0].shape)",
        cut=cut,
        imports="Client",
    )
    labels = [one.tokens[0] for one in found]
    yield Message(header={"tokens": labels, "text_count": len(texts) * copies, "python": "import time\n\n" + python})
    began = time.perf_counter()
    arriving = session.client.embed_layers(texts * copies, layers="all", **cut)
    async with contextlib.aclosing(arriving) as parts:
        async for part in parts:
            elapsed_ms = (time.perf_counter() - began) * 1000
            shown = {
                f"rows_{text}": rows
                for text, rows in zip(part.texts, part.rows, strict=True)
                if text < len(texts)  # Copies are the same.
            }
            header = {"layer": part.layer, "text_count": len(part.texts), "elapsed_ms": elapsed_ms}
            yield Message(header=header, arrays=shown)
    yield Message(header={"done": True, "elapsed_ms": (time.perf_counter() - began) * 1000})


async def change(session: Session, request: Request) -> AsyncGenerator[Message, None]:
    """Yields how each token changes from layer to layer."""
    texts, cut = request.texts, request.cut
    embedding = await session.layers(texts, cut)
    arrays = {
        f"{measure}_{n}": analysis.tokens_by_layers(embedding, measure=measure, text=n)
        for measure in analysis.MEASURES
        for n in range(len(texts))
    }
    measures = [
        f'{name} = [analysis.tokens_by_layers(embedding, measure="{name}", text=n) for n in range(len(texts))]'
        for name in analysis.MEASURES
    ]
    python = recipes.lines(session.target, texts, recipes.ALL_LAYERS, *measures, cut=cut)
    yield _of_layers(embedding, python, arrays)


async def likeness(session: Session, request: Request) -> AsyncGenerator[Message, None]:
    """Yields how alike tokens are in a layer, and how alike two tokens and two texts are in each layer."""
    texts, cut = request.texts, request.cut
    embedding = await session.layers(texts, cut)
    other = len(texts) - 1
    layer = min(request.number("layer", least=0) or 0, embedding.layers[-1])
    arrays = {"similarity": analysis.similarity(embedding, layer=layer, texts=(0, other))}
    rest = [recipes.ALL_LAYERS, f"similarity = analysis.similarity(embedding, layer={layer}, texts=(0, {other}))"]
    if other:
        poolings = request.poolings(embedding.layers[-1])
        pools = await session.pools(texts, poolings, cut)
        arrays["trajectory"] = analysis.trajectory(pools)
        chosen = recipes.poolings(poolings[0].strategy, len(poolings) - 1, poolings[0].include_special_tokens)
        rest += [
            f"pools = client.embed(texts, pooling={chosen}" + "{options})",
            "trajectory = analysis.trajectory(pools)",
        ]
    pair = request.tokens("pair")
    if pair and all(text < len(texts) and token < embedding.token_counts[text] for text, token in pair):
        arrays["token_trajectory"] = analysis.token_trajectory(embedding, tokens=pair)
        rest.append(f"token_trajectory = analysis.token_trajectory(embedding, tokens={pair!r})")
    python = recipes.lines(session.target, texts, *rest, cut=cut)
    yield _of_layers(embedding, python, arrays, layer=layer)


async def map_(session: Session, request: Request) -> AsyncGenerator[Message, None]:
    """Yields the tokens of all layers on the same two axes."""
    texts, cut = request.texts, request.cut
    embedding = await session.layers(texts, cut)
    axes_of = request.number("axes_of", least=0)
    if axes_of is not None:
        axes_of = min(axes_of, embedding.layers[-1])
    found = await asyncio.to_thread(analysis.projection, embedding, layer=axes_of)
    python = recipes.lines(
        session.target,
        texts,
        recipes.ALL_LAYERS,
        f"found = analysis.projection(embedding, layer={axes_of})",
        "points, explained = found.points, found.explained",
        cut=cut,
    )
    yield _of_layers(embedding, python, {"points": found.points, "explained": found.explained})


async def attention(session: Session, request: Request) -> AsyncGenerator[Message, None]:
    """Yields where each token of a text looks: one head whole, and all heads small."""
    texts, cut = request.texts, request.cut
    text = min(request.number("text", least=0) or 0, len(texts) - 1)
    embedding = await session.attentions(texts[text], cut)
    held = embedding.attentions
    layer = min(request.number("layer", least=0) or 0, held.layers[-1])
    head = min(request.number("head", least=0) or 0, held.heads[-1])
    arrays = {"attention": held.ragged(layer)[0][head]}
    if request.flag("grid", False):
        arrays["grid"] = await asyncio.to_thread(_grid, embedding)
    python = recipes.lines(
        session.target,
        [texts[text]],
        'embedding = client.embed(texts, attentions="all"{options}, return_tokens=True)',
        f"attention = embedding.attentions.ragged({layer})[0][{head}]",
        cut=cut,
        imports="Client",
    )
    yield _of_layers(embedding, python, arrays, layer=layer, head=head, layers=held.layers, heads=held.heads, text=text)


def _grid(embedding: Embedding) -> Any:
    """Returns all heads, each small. Shape: [layer, head, cell, cell]."""
    held = embedding.attentions
    rows = np.stack([held.ragged(layer)[0] for layer in held.layers])
    block = -(-rows.shape[-1] // _GRID_CELLS)
    starts = np.arange(0, rows.shape[-1], block)
    return np.maximum.reduceat(np.maximum.reduceat(rows, starts, axis=-1), starts, axis=-2)


def _of_layers(embedding: Embedding, python: str, arrays: dict[str, Any], **more: Any) -> Message:
    labels = [own[: int(count)] for own, count in zip(embedding.tokens.tokens, embedding.token_counts, strict=True)]
    truncated = embedding.truncated.tolist()
    header = {"tokens": labels, "truncated": truncated, "layers": embedding.layers, "python": python, **more}
    return Message(header=header, arrays=arrays)


def _ids(one: Tokens, count: int | None = None) -> TokenIds:
    """Returns the ids of one text as they are to be computed: all positions, or the first ones with a mask of ones."""
    whole = slice(count)
    mask = one.attention_mask[0, whole]
    return TokenIds(
        input_ids=one.input_ids[0, whole],
        attention_mask=mask if count is None else np.ones_like(mask),
        token_type_ids=one.token_type_ids[0, whole],
    )


def _token_table(one: Tokens) -> dict[str, Any]:
    """Returns the columns of one text's tokens."""
    names = ("input_ids", "attention_mask", "token_type_ids", "special_tokens_mask", "word_ids", "offset_mapping")
    columns = {name: getattr(one, name)[0].tolist() for name in names}
    return {"tokens": one.tokens[0], "truncated": bool(one.truncated[0]), **columns}
