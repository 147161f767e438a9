"""Which layer of the model suits a task best: a grid search over layer and pooling. Needs scikit-learn.

    layertap-server &
    python examples/best_layer.py

The task here is to tell the past from the present, with verbs that the classifier has not seen.
"""

from __future__ import annotations

import argparse
import itertools

from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline

from layertap import Client
from layertap.integrations.sklearn import LayertapVectorizer

WHO = ("the doctor", "my neighbour", "a small dog", "her brother")
VERBS = ("sings sang", "writes wrote", "falls fell", "runs ran", "speaks spoke", "drives drove", "eats ate", "wins won")


def task() -> tuple[list[str], list[bool], list[str]]:
    """Returns texts, whether each is in the past, and its verb."""
    rows = [
        (f"{who} {verb} at home", verb == pair.split()[1], pair)
        for who, pair in itertools.product(WHO, VERBS)
        for verb in pair.split()
    ]
    texts, labels, verbs = zip(*rows, strict=True)
    return list(texts), list(labels), list(verbs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", help="the server; 127.0.0.1:50051 without it")
    client = Client(parser.parse_args().target)
    texts, labels, verbs = task()

    pipeline = make_pipeline(LayertapVectorizer(client), LogisticRegression(max_iter=1000))
    grid = {
        "layertapvectorizer__layer": range(client.model_info().layer_count + 1),
        "layertapvectorizer__pooling": ["mean", "cls"],
    }
    search = GridSearchCV(pipeline, grid, cv=GroupKFold(2), refit=False).fit(texts, labels, groups=verbs)

    results = zip(search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True)
    for parameters, score in results:
        layer, pooling = parameters.values()
        print(f"layer {layer:2} {pooling:4} {score:.3f}")
    print(f"best: {search.best_params_}")


if __name__ == "__main__":
    main()
