"""What the methods of the clients ask for where the caller says little, and how many requests a long list becomes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from layertap import InvalidArgumentError, Limits
from layertap._protocol import requests
from layertap.v1 import embedding_pb2 as pb

LAST = pb.Output(hidden_states=pb.HiddenStates(layers=[-1]))
MEAN = pb.PooledVectors(strategy=pb.POOLING_STRATEGY_MEAN, layer=-1)
UNSTATED = Limits(**dict.fromkeys((field.name for field in dataclasses.fields(Limits)), 0))
OF_SPANS = pb.SpanVectors(strategy=pb.POOLING_STRATEGY_MEAN, layer=-1)


@pytest.mark.parametrize(
    ("options", "outputs", "is_small"),
    [
        ({}, [LAST], False),
        ({"pooling": "mean"}, [pb.Output(pooled_vectors=MEAN)], True),
        ({"pooler_output": True}, [pb.Output(pooler_output=pb.PoolerOutput())], True),
        ({"pooling": "mean", "return_tokens": True}, [pb.Output(pooled_vectors=MEAN)], False),
        ({"pooling": "mean", "layers": -1}, [LAST, pb.Output(pooled_vectors=MEAN)], False),
        ({"spans": [(0, 1)]}, [pb.Output(span_vectors=OF_SPANS)], False),
        (
            {"spans": [(0, 1)], "pooling": "mean"},
            [pb.Output(pooled_vectors=MEAN), pb.Output(span_vectors=OF_SPANS)],
            False,
        ),
    ],
    ids=str,
)
def test_what_embed_asks_for(options: Any, outputs: list[pb.Output], is_small: bool) -> None:
    spans = list(options.get("spans", ()))
    request = requests.embed("a text", options)
    assert list(request.options.outputs) == outputs and request.is_small == is_small
    assert request.messages[0].spans.bounds == [bound for span in spans for bound in span]


def test_embed_layers_asks_for_all_layers_by_default() -> None:
    (all_layers,) = requests.embed_layers("a text", {}).options.outputs
    assert all_layers.hidden_states.all_layers
    (some,) = requests.embed_layers("a text", {"layers": [1]}).options.outputs
    assert some.hidden_states.layers == [1] and not some.hidden_states.all_layers


@pytest.mark.parametrize(
    ("lengths", "counts"),
    [([1] * 600, [256, 256, 88]), ([60_000] * 3, [1, 1, 1]), ([200_000, 1, 1, 200_000, 1], [1, 2, 1, 1]), ([1], [1])],
)
def test_a_list_is_tokenized_in_requests_of_bounded_size(lengths: list[int], counts: list[int]) -> None:
    found = [one.request for one in requests.tokenize(["x" * length for length in lengths])]
    assert [len(one.inputs) for one in found] == counts
    assert [one.first_text for one in found] == [sum(counts[:n]) for n in range(len(counts))]
    assert [len(text.text) for one in found for text in one.inputs] == lengths


@pytest.mark.parametrize(
    ("text_count", "byte_count", "exceeds"),
    [(0, 0, False), (40, 0, False), (39, 0, True), (0, 100_000, False), (0, 39_000, True), (39, 100_000, True)],
)
def test_a_limit_holds_where_the_server_states_it(text_count: int, byte_count: int, exceeds: bool) -> None:
    limits = dataclasses.replace(UNSTATED, max_text_count=text_count, max_request_bytes=byte_count)
    request = requests.embed(["x" * 1000] * 40, {})
    assert request.exceeds(limits, named_timeout=False) is exceeds
    if exceeds:
        with pytest.raises(InvalidArgumentError, match="leave timeout_s out, or use embed_stream"):
            request.exceeds(limits, named_timeout=True)
