"""`LayertapVectorizer` with the real scikit-learn."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils import get_tags

from layertap import Client, InvalidArgumentError, LayerMix, Pooling
from layertap.integrations.sklearn import LayertapVectorizer
from layertap_server.testing import ServerProcess

TEXTS = [f"{who} {verb}" for who in ("the cat", "my aunt", "a bird", "the king") for verb in ("sings", "sang")]
LABELS = [text.endswith("sang") for text in TEXTS]


@pytest.mark.parametrize(
    ("parameters", "pooling"),
    [
        ({}, "mean"),
        ({"layer": 2, "pooling": "cls"}, Pooling("cls", 2)),
        ({"include_special_tokens": False, "normalize": True}, Pooling("mean", -1, False, normalize=True)),
        ({"dimensions": 8}, Pooling("mean", dimensions=8)),
        ({"layer": LayerMix("concat", [1, 2])}, Pooling("mean", LayerMix("concat", [1, 2]))),
    ],
    ids=str,
)
def test_vectors_are_those_of_embed(client: Client, parameters: dict[str, Any], pooling: Any) -> None:
    found = LayertapVectorizer(client, **parameters).fit_transform(TEXTS, LABELS)
    assert np.array_equal(found, client.embed(TEXTS, pooling=pooling).pooled)


def test_long_texts_are_cut_unless_that_is_an_error(client: Client) -> None:
    text = "one two three " * 400
    found = LayertapVectorizer(client, max_length=7).transform([text])
    assert np.array_equal(found, client.embed(text, truncation="right", max_length=7, pooling="mean").pooled)
    with pytest.raises(InvalidArgumentError, match="tokens"):
        LayertapVectorizer(client, truncation="error").transform([text])


def test_it_is_an_estimator_like_any_other(server: ServerProcess, client: Client) -> None:
    vectorizer = LayertapVectorizer(client, layer=3)
    assert vectorizer.get_params() == {
        "client": client,
        "layer": 3,
        "pooling": "mean",
        "include_special_tokens": True,
        "normalize": False,
        "dimensions": None,
        "truncation": "right",
        "max_length": None,
    }
    expected = vectorizer.transform(TEXTS)
    by_target = LayertapVectorizer(server.address, layer=3)
    for other in (clone(vectorizer), pickle.loads(pickle.dumps(vectorizer)), by_target, clone(by_target)):
        assert np.array_equal(other.transform(np.array(TEXTS, object)), expected)
    assert vectorizer.set_params(layer=0).layer == 0
    tags = get_tags(vectorizer)
    assert tags.input_tags.string and not tags.input_tags.two_d_array and not tags.requires_fit


def test_no_texts_and_one_string_are_refused(client: Client) -> None:
    with pytest.raises(ValueError, match="X has no texts"):
        LayertapVectorizer(client).transform([])
    with pytest.raises(InvalidArgumentError, match="one str"):
        LayertapVectorizer(client).transform("one text")


def test_it_takes_a_column_of_a_table(client: Client) -> None:
    import pandas

    table = pandas.DataFrame({"text": TEXTS, "length": [len(text) for text in TEXTS]})
    columns = ColumnTransformer(
        [("vectors", LayertapVectorizer(client), "text"), ("length", "passthrough", ["length"])], sparse_threshold=0
    )
    found = columns.fit_transform(table)
    assert found.shape == (8, 385)
    assert np.allclose(found[:, :384], client.embed(TEXTS, pooling="mean").pooled)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_grid_search_finds_the_best_layer_and_pooling(client: Client, jobs: int, tmp_path: Path) -> None:
    memory = str(tmp_path) if jobs == 1 else None
    pipeline = make_pipeline(LayertapVectorizer(client), LogisticRegression(max_iter=1000), memory=memory)
    grid = {"layertapvectorizer__layer": [0, 6], "layertapvectorizer__pooling": ["mean", "max"]}
    search = GridSearchCV(pipeline, grid, cv=2, n_jobs=jobs).fit(TEXTS, LABELS)
    assert search.best_score_ == max(search.cv_results_["mean_test_score"]) > 0.5
    assert search.best_estimator_[0].layer == search.best_params_["layertapvectorizer__layer"]
    assert search.predict(TEXTS).shape == (8,)
