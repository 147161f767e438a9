"""Fewer bits: equal to what the installed sentence-transformers makes of the same numbers."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from sentence_transformers.util import quantize_embeddings as oracle

from layertap import InvalidArgumentError, quantization, quantize_embeddings

RANDOM = np.random.default_rng(0)
VECTORS = RANDOM.normal(size=(5000, 21)).astype(np.float32)
ONE_CONSTANT = np.where(np.arange(21) == 3, np.float32(0.5), VECTORS[:200])
RANGES = np.stack([VECTORS[:50].min(0), VECTORS[:50].max(0)])


def same(found: Any, wanted: Any) -> None:
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    assert (found == wanted).all()


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """The oracle warns of few embeddings."""
    caplog.set_level(logging.ERROR)


@pytest.mark.parametrize("precision", quantization.PRECISIONS)
@pytest.mark.parametrize("given", [VECTORS, VECTORS[:2], VECTORS[:0], ONE_CONSTANT, VECTORS.astype(np.float16)])
def test_embeddings_are_quantized_as_by_sentence_transformers(precision: str, given: Any) -> None:
    same(quantize_embeddings(given, precision=precision), oracle(given, precision=precision))


@pytest.mark.parametrize("precision", quantization.PRECISIONS)
@pytest.mark.parametrize("given", [VECTORS, VECTORS[7]], ids=["many", "one"])
def test_with_the_ranges_of_others(precision: str, given: Any) -> None:
    same(
        quantize_embeddings(given, precision=precision, ranges=RANGES),
        oracle(given, precision=precision, ranges=RANGES),
    )


@pytest.mark.parametrize("precision", quantization.PRECISIONS)
def test_matrices_share_their_ranges(precision: str) -> None:
    given = [VECTORS[:3], VECTORS[3:4], VECTORS[4:90]]
    found, wanted = quantization.quantize_matrices(given, precision=precision), oracle(given, precision=precision)
    for one, other in zip(found, wanted, strict=True):
        same(one, other)
    assert quantization.quantize_matrices([], precision=precision) == []


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
def test_bits_need_no_company(precision: str) -> None:
    same(quantize_embeddings(VECTORS[0], precision=precision), oracle(VECTORS[0], precision=precision))


def test_a_list_of_lists_is_an_array_too() -> None:
    same(quantize_embeddings([[1.0, -1.0], [0.0, 2.0]], precision="ubinary"), np.array([[128], [64]], np.uint8))


def test_what_is_given_is_left_alone() -> None:
    before = VECTORS.copy()
    for precision in quantization.PRECISIONS:
        quantize_embeddings(VECTORS, precision=precision)
    same(VECTORS, before)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (VECTORS, {"precision": "int4"}, "precision is 'int4'"),
        (VECTORS[:1], {"precision": "int8"}, "one embedding alone has no ranges"),
        (VECTORS[0], {"precision": "uint8"}, "one embedding alone has no ranges"),
        (VECTORS, {"precision": "int8", "ranges": RANGES[:, :5]}, r"ranges has shape \(2, 5\)"),
        (VECTORS, {"precision": "int8", "ranges": RANGES.T}, r"ranges has shape \(21, 2\)"),
        (np.ones((3, 4), np.int8), {"precision": "binary"}, "dtype int8"),
    ],
)
def test_what_cannot_be_quantized_is_refused(given: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        quantize_embeddings(given, **options)
