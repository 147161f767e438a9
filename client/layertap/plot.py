"""Pictures of an `Embedding` in matplotlib, one call each; the numbers are those of `analysis`.

Needs the extra `plot`; without it each function raises ModuleNotFoundError. Each returns a figure of pyplot, which a
notebook shows by itself, and takes the same arguments as the function of `analysis` whose numbers it draws. Labels of
tokens need `return_tokens=True`; without them there are positions. Colours are told apart by readers who see few:
viridis for amounts, blue to red around 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from layertap import analysis, optional_deps
from layertap.analysis import Measure
from layertap.results.embedding import Embedding

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLES: Final[dict[Measure, str]] = {
    "cosine_to_first": "cosine to the token's own row in layer {first}",
    "cosine_to_previous": "cosine to the token's own row in the layer below",
    "norm": "length of the token's row",
}
_PANEL_INCHES: Final = 3.3
_CELL_INCHES: Final = 0.28
_MAX_INCHES: Final = 16.0
_MAX_LABELS: Final = 64
"""More labels on an axis than this are left out: they would lie on one another."""


def tokens_by_layers(embedding: Embedding, *, measure: Measure = "cosine_to_first", text: int = 0) -> Figure:
    """Returns a heatmap of how each token changes from layer to layer; see `analysis.tokens_by_layers`."""
    values = analysis.tokens_by_layers(embedding, measure=measure, text=text)
    figure, (axis,) = _figure(1, width=2 + _CELL_INCHES * values.shape[1], height=1.6 + _CELL_INCHES * len(values))
    limits = {} if measure == "norm" else {"vmin": min(0.0, float(values.min())), "vmax": 1.0}
    image = axis.imshow(values, cmap="viridis", aspect="auto", origin="lower", **limits)
    _label(axis, "x", _pieces(embedding, text))
    _label(axis, "y", [str(layer) for layer in embedding.layers])
    axis.set_ylabel("layer")
    figure.colorbar(image, ax=axis, label=_TITLES[measure].format(first=embedding.layers[0]))
    return figure


def similarity(embedding: Embedding, *, layers: int | Sequence[int] = -1, texts: tuple[int, int] = (0, 0)) -> Figure:
    """Returns heatmaps of the cosines of the tokens of two texts, one for each layer; see `analysis.similarity`.

    Raises:
        IndexError: if a layer is not held.
    """
    chosen = _several(layers)
    panels = [analysis.similarity(embedding, layer=layer, texts=texts) for layer in chosen]
    figure, axes = _figure(len(panels), width=_PANEL_INCHES * len(panels), height=3.9)
    for axis, layer, values in zip(axes, chosen, panels, strict=True):
        image = axis.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
        axis.set_title(f"layer {embedding.hidden_states.absolute(layer)}")
        _label(axis, "x", _pieces(embedding, texts[1]))
        _label(axis, "y", _pieces(embedding, texts[0]))
    figure.colorbar(image, ax=list(axes), label="cosine (blue: below 0)")
    return figure


def trajectory(embedding: Embedding, *, pairs: Sequence[tuple[int, int]] = ((0, 1),)) -> Figure:
    """Returns lines of how alike the pooled vectors of pairs of texts are in each layer; see `analysis.trajectory`.

    Raises:
        LookupError: if no pooling was requested.
    """
    lines = [(f"texts {one} and {other}", analysis.trajectory(embedding, texts=(one, other))) for one, other in pairs]
    return _lines(lines, range(len(embedding.pools)), "cosine of the pooled vectors")


def token_trajectory(
    embedding: Embedding, *, pairs: Sequence[tuple[tuple[int, int], tuple[int, int]]], labels: Sequence[str] = ()
) -> Figure:
    """Returns lines of how alike pairs of tokens are in each layer; see `analysis.token_trajectory`.

    Args:
        embedding: What `embed(layers="all")` returned.
        pairs: Two tokens for each line, each as (text, token).
        labels: What each line is called; none: its tokens.
    """
    names = labels or [" and ".join(f"{_pieces(embedding, t)[k]} ({t})" for t, k in pair) for pair in pairs]
    lines = [analysis.token_trajectory(embedding, tokens=pair) for pair in pairs]
    return _lines(list(zip(names, lines, strict=True)), embedding.layers, "cosine of the tokens")


def projection(
    embedding: Embedding,
    *,
    layers: int | Sequence[int] = -1,
    texts: Sequence[int] | None = None,
    axes_of: int | None = None,
) -> Figure:
    """Returns maps of all tokens, one for each layer, on the same axes; see `analysis.projection`.

    Args:
        embedding: What `embed(layers="all")` returned.
        layers: The layers that are shown.
        texts: The texts; None: all. Each has its own marker and colour.
        axes_of: The layer that the axes are of; None: all held layers.

    Raises:
        IndexError: if a layer is not held.
    """
    found = analysis.projection(embedding, texts=texts, layer=axes_of)
    shown = list(map(embedding.hidden_states.absolute, _several(layers)))
    figure, axes = _figure(len(shown), width=1 + 3.8 * len(shown), height=4.2)
    ends = np.cumsum(found.token_counts)
    for axis, layer in zip(axes, shown, strict=True):
        points = found.points[found.layers.index(layer)]
        for n, (text, end) in enumerate(zip(texts or range(len(embedding)), ends, strict=True)):
            own = points[end - found.token_counts[n] : end]
            axis.scatter(*own.T, marker="os^D"[n % 4], label=f"text {text}", alpha=0.8)
            if len(own) <= _MAX_LABELS:
                for point, piece in zip(own, _pieces(embedding, text), strict=True):
                    axis.annotate(piece, point, xytext=(3, 3), textcoords="offset points", fontsize="x-small")
        axis.set_title(f"layer {layer}")
        axis.set_xlabel(f"first component ({found.explained[0]:.0%} of the variance)")
        low, high = found.points.min((0, 1)), found.points.max((0, 1))
        axis.set_xlim(*_widened(low[0], high[0]))
        axis.set_ylim(*_widened(low[1], high[1]))
    axes[0].set_ylabel(f"second component ({found.explained[1]:.0%})")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def attention(
    embedding: Embedding, *, layer: int = -1, heads: int | Sequence[int] | None = None, text: int = 0
) -> Figure:
    """Returns heatmaps of where each token looks, one for each head.

    Args:
        embedding: What `embed(attentions=…)` returned.
        layer: The encoder block, from 0; negative ones count from the last.
        heads: The heads; None: all that are held.
        text: The text.

    Raises:
        LookupError: if attentions were not requested, or not of this block or head.
    """
    held = embedding.attentions
    chosen = _several(held.heads if heads is None else heads)
    if missing := set(chosen) - set(held.heads):
        raise LookupError(f"head {min(missing)} is not held; ask for it with attention_heads=[{min(missing)}]")
    rows = held.ragged(layer)[text]
    figure, axes = _figure(len(chosen), width=_PANEL_INCHES * min(len(chosen), 4), height=3.9, columns=4)
    for axis, head in zip(axes, chosen, strict=False):
        image = axis.imshow(rows[held.heads.index(head)], cmap="viridis", vmin=0, vmax=1)
        axis.set_title(f"layer {held.absolute(layer)}, head {head}")
        _label(axis, "x", _pieces(embedding, text))
        _label(axis, "y", _pieces(embedding, text))
    figure.colorbar(image, ax=list(axes), label="attention")
    return figure


def _lines(lines: Sequence[tuple[str, Any]], layers: Sequence[int], label: str) -> Figure:
    figure, (axis,) = _figure(1, width=7, height=3.6)
    for n, (name, values) in enumerate(lines):
        axis.plot(list(layers), values, marker="os^D"[n % 4], label=name)
    axis.set(xlabel="layer", ylabel=label, xticks=list(layers))
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _figure(count: int, *, width: float, height: float, columns: int = 8) -> tuple[Figure, Any]:
    """Returns a figure and its panels, in rows of at most `columns`."""
    optional_deps.load("matplotlib", extra="plot", purpose="layertap.plot")
    from matplotlib import pyplot

    rows = -(-count // columns)
    figure, axes = pyplot.subplots(
        rows,
        min(count, columns),
        figsize=(min(width, _MAX_INCHES), height * rows),
        layout="constrained",
        squeeze=False,
    )
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, axes.flat[:count]


def _label(axis: Any, side: str, names: Sequence[str]) -> None:
    """Puts a name at each cell of an axis, if they fit."""
    if len(names) <= _MAX_LABELS:
        place = axis.set_xticks if side == "x" else axis.set_yticks
        place(range(len(names)), names, rotation=90 if side == "x" else 0)


def _pieces(embedding: Embedding, text: int) -> list[str]:
    """Returns the tokens of one text, or their positions if they were not requested."""
    count = int(embedding.token_counts[text])
    try:
        return embedding.tokens.tokens[text][:count]
    except LookupError:
        return [str(position) for position in range(count)]


def _several(numbers: int | Sequence[int]) -> list[int]:
    return [numbers] if isinstance(numbers, int) else list(numbers)


def _widened(low: float, high: float) -> tuple[float, float]:
    space = 0.08 * (high - low) or 1.0
    return float(low - space), float(high + space)
