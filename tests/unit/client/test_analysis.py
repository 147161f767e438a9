"""The numbers of `layertap.analysis`, each against one computed by hand, and the figures of `layertap.plot`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from support.results import embedding, tokens

from layertap import Embedding, HiddenStates, Pooling, analysis, plot
from layertap.results.attentions import Attentions

ALL = tuple(range(7))


@pytest.fixture
def whole() -> Embedding:
    return embedding(layers=ALL, pools=2)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_each_layer_is_pooled_once() -> None:
    assert analysis.each_layer("cls", 2) == [Pooling("cls", layer=layer) for layer in (0, 1, 2)]
    assert not analysis.each_layer("mean", 1, include_special_tokens=False)[1].include_special_tokens


def test_tokens_by_layers_compares_a_token_with_itself(whole: Embedding) -> None:
    rows = [whole.ragged(layer)[1] for layer in ALL]
    first = analysis.tokens_by_layers(whole, text=1)
    previous = analysis.tokens_by_layers(whole, text=1, measure="cosine_to_previous")
    norms = analysis.tokens_by_layers(whole, text=1, measure="norm")
    assert first.shape == previous.shape == norms.shape == (7, 3) and first.dtype == np.float32
    assert np.allclose(first[0], 1) and np.allclose(previous[0], 1)
    assert first[4, 2] == pytest.approx(cosine(rows[0][2], rows[4][2]), abs=1e-6)
    assert previous[4, 2] == pytest.approx(cosine(rows[3][2], rows[4][2]), abs=1e-6)
    assert norms[4, 2] == pytest.approx(np.linalg.norm(rows[4][2]), rel=1e-6)


def test_what_cannot_be_compared_is_refused(whole: Embedding) -> None:
    with pytest.raises(ValueError, match="use one of cosine_to_first, cosine_to_previous, norm"):
        analysis.tokens_by_layers(whole, measure="angle")  # type: ignore[arg-type]
    with pytest.raises(LookupError, match='pass layers="all"'):
        analysis.tokens_by_layers(embedding(pools=1))
    with pytest.raises(LookupError, match="each_layer"):
        analysis.trajectory(embedding(layers=(0,)))
    with pytest.raises(IndexError, match="ask for it"):
        analysis.similarity(embedding(layers=(0,)), layer=3)


def test_similarity_is_of_each_pair(whole: Embedding) -> None:
    found = analysis.similarity(whole, layer=-1, texts=(0, 1))
    one, other = whole.ragged(6)
    assert found.shape == (5, 3) and found[3, 1] == pytest.approx(cosine(one[3], other[1]), abs=1e-6)
    assert np.allclose(np.diag(analysis.similarity(whole, layer=2)), 1)


def test_rows_of_zeros_are_like_nothing() -> None:
    assert analysis.cosines([[0, 0], [3, 4]], [[0, 0], [6, 8]]).tolist() == [[0, 0], [0, 1]]


def test_trajectories_go_through_poolings_and_layers(whole: Embedding) -> None:
    assert analysis.trajectory(whole) == pytest.approx([cosine(*pool) for pool in whole.pools], abs=1e-6)
    found = analysis.token_trajectory(whole, tokens=((0, 4), (1, 2)))
    assert found[5] == pytest.approx(cosine(whole.ragged(5)[0][4], whole.ragged(5)[1][2]), abs=1e-6)


@pytest.mark.parametrize("layer", [None, 3])
def test_a_projection_keeps_its_axes(whole: Embedding, layer: int | None) -> None:
    found = analysis.projection(whole, layer=layer)
    assert found.points.shape == (7, 8, 2) and found.layers == ALL and found.token_counts.tolist() == [5, 3]
    rows = np.concatenate([np.concatenate(whole.ragged(one)) for one in (ALL if layer is None else [layer])])
    _, sizes, directions = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    wanted = (np.concatenate(whole.ragged(5)) - rows.mean(0)) @ directions[:2].T
    signs = np.sign(directions[range(2), np.abs(directions[:2]).argmax(1)])
    assert np.allclose(found.points[5], wanted * signs, atol=1e-4)
    assert np.allclose(found.explained, (sizes**2 / (sizes**2).sum())[:2], atol=1e-5)
    assert np.array_equal(analysis.projection(whole, layer=layer).points, found.points)


def test_a_projection_of_one_text_with_rows_that_are_all_alike() -> None:
    same = HiddenStates(ragged={0: np.ones((8, 4), np.float32)}, token_counts=np.array([5, 3]), layer_count=6)
    found = analysis.projection(embedding(hidden_states=same), texts=[1])
    assert found.points.shape == (1, 3, 2) and not found.points.any() and not found.explained.any()


def test_the_nearest_come_first_and_equals_in_order() -> None:
    order, found = analysis.nearest([[0, 1], [1, 0], [2, 0], [1, 1]], [3, 0], count=3)
    assert order.tolist() == [1, 2, 3] and found.tolist() == pytest.approx([1, 1, np.sqrt(0.5)])


# Figures.


@pytest.fixture
def pyplot(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[Any]:
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def labelled() -> Embedding:
    ragged = {layer: np.full((34, 3), 0.2, np.float32) for layer in range(6)}
    attentions = Attentions(ragged=ragged, heads=(0, 2, 5), token_counts=np.array([5, 3]), layer_count=6)
    return embedding(layers=ALL, pools=7, _tokens=tokens(), _attentions=attentions)


FIGURES: dict[str, tuple[Callable[[Embedding], Any], int]] = {
    "tokens_by_layers": (lambda one: plot.tokens_by_layers(one), 2),
    "norm": (lambda one: plot.tokens_by_layers(one, measure="norm", text=1), 2),
    "similarity": (lambda one: plot.similarity(one, layers=[0, 3, -1], texts=(0, 1)), 4),
    "trajectory": (lambda one: plot.trajectory(one), 1),
    "token_trajectory": (lambda one: plot.token_trajectory(one, pairs=[((0, 1), (1, 1))]), 1),
    "projection": (lambda one: plot.projection(one, layers=[0, -1], axes_of=6), 2),
    "attention": (lambda one: plot.attention(one), 4),
    "one head": (lambda one: plot.attention(one, layer=0, heads=5, text=1), 2),
}


@pytest.mark.parametrize(("draw", "axis_count"), FIGURES.values(), ids=FIGURES.keys())
def test_each_figure_is_one_call(pyplot: Any, draw: Callable[[Embedding], Any], axis_count: int) -> None:
    figure = draw(labelled())
    figure.canvas.draw()
    assert sum(axis.get_visible() for axis in figure.axes) == axis_count
    assert pyplot.get_fignums() == [figure.number]
    for legend in figure.legends:
        frame = legend.get_window_extent()
        assert not any(frame.overlaps(axis.get_window_extent()) for axis in figure.axes), "a legend covers points"


def test_figures_show_the_numbers_of_the_analysis(pyplot: Any) -> None:
    one = labelled()
    image = plot.tokens_by_layers(one).axes[0].images[0]
    values = analysis.tokens_by_layers(one)
    assert np.array_equal(image.get_array(), values)
    assert values.min() < 0 and image.get_clim() == (values.min(), 1), "the colours do not reach what is negative"
    axis = plot.similarity(one, layers=2, texts=(1, 0)).axes[0]
    assert np.array_equal(axis.images[0].get_array(), analysis.similarity(one, layer=2, texts=(1, 0)))
    assert axis.images[0].get_clim() == (-1, 1) and axis.get_title() == "layer 2"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["[CLS]", "hello", "[SEP]"]
    line = plot.trajectory(one).axes[0].lines[0]
    assert np.array_equal(line.get_ydata(), analysis.trajectory(one))


def test_without_tokens_labels_are_positions_and_what_is_missing_is_named(pyplot: Any) -> None:
    axis = plot.tokens_by_layers(embedding(layers=ALL)).axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "1", "2", "3", "4"]
    with pytest.raises(LookupError, match=r"attention_heads=\[1\]"):
        plot.attention(labelled(), heads=1)
    with pytest.raises(IndexError, match=r"layer 9 is not held .* layers=\[9\]"):
        plot.projection(labelled(), layers=[9])


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch, whole: Embedding) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"layertap\.plot needs matplotlib.*layertap\[plot\]"):
        plot.trajectory(whole)
