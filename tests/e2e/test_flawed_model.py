"""A model whose weights go wrong for some tokens, under small limits: what cannot be sent is refused, text by text."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import safetensors.torch
import torch
from support import Server, open_client, running
from support.refusals import GOOD, SECRET, Stub, check_message, raw_refused, refused

from layertap import Client, LayerMix, Pooling
from layertap.errors import (
    FailedPreconditionError,
    InternalError,
    LayertapError,
    OutOfRangeError,
    ResourceExhaustedError,
)
from layertap.v1 import embedding_pb2 as pb

OVERFLOWING, NAN = "rome", "berlin"
"""Words whose rows of the flawed model are wrong: layer 0 exceeds float16; every layer is NaN."""


@pytest.fixture(scope="module")
def flawed_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flawed-bert")
    for path in tiny_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = safetensors.torch.load_file(tiny_folder / "model.safetensors")
    weights = {name: tensor.clone() for name, tensor in weights.items() if not name.startswith("pooler.")}
    words = weights["embeddings.word_embeddings.weight"]
    lines = (tiny_folder / "vocab.txt").read_text().splitlines()
    # Normalized, a row of 32 values of which one is huge has about 5.6 there; others seldom exceed 3.
    weights["embeddings.LayerNorm.weight"][0] = 14_000.0
    words[:, 0] = 0.0
    words[lines.index(OVERFLOWING), 0] = 1e4
    words[lines.index(NAN)] = torch.nan
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def flawed_server(flawed_folder: Path) -> Iterator[Server]:
    limits = ("--max-request-bytes", "65536", "--max-response-bytes", "65536", "--max-frame-bytes", "16384")
    with running("--device", "cpu", "--model-id", str(flawed_folder), "--log-level", "debug", *limits) as started:
        yield started


@pytest.fixture
def flawed(kind: str, flawed_server: Server) -> Iterator[Any]:
    """Each of the clients on the flawed model; after the test it still answers a good request."""
    opened = open_client(kind, flawed_server.address)
    yield opened
    assert np.isfinite(opened.embed(GOOD).last_hidden_state).all()
    opened.close()
    assert SECRET not in flawed_server.log.decode().lower()


def test_the_flawed_model_is_flawed_as_intended(flawed: Any) -> None:
    layer = flawed.embed([GOOD, f"I love {OVERFLOWING}"], layers=[0]).hidden_states[0]
    assert np.isfinite(layer).all()
    assert np.abs(layer[0]).max() < 65504 < np.abs(layer[1]).max()


def test_a_value_that_does_not_fit_float16(flawed: Any) -> None:
    inputs = [f"{SECRET} {GOOD}", GOOD, f"{SECRET} loves {OVERFLOWING}", GOOD]
    named = ("inputs[2]", "layer 0", "float16", "float32")
    refused(OutOfRangeError, lambda: flawed.embed(inputs, layers=[0], dtype="float16"), *named)
    refused(OutOfRangeError, lambda: list(flawed.embed_layers(inputs, layers=[0], dtype="float16")), *named)
    pooling = Pooling("max", layer=0)
    refused(OutOfRangeError, lambda: flawed.embed(inputs, pooling=pooling, dtype="float16"), *named)
    whole = flawed.embed(inputs, layers=[0])
    wide = flawed.embed(inputs, layers=[0], dtype="bfloat16")
    assert np.isfinite(whole.hidden_states[0]).all() and np.isfinite(wide.hidden_states[0]).all()
    results = list(flawed.embed_stream(inputs, layers=[0], dtype="float16"))
    assert [type(result.error) for result in results] == [type(None), type(None), OutOfRangeError, type(None)]
    check_message(results[2].error.details, "item 2", "layer 0", "float16", "float32")
    for n in (0, 1, 3):
        mine, other = results[n].embedding.ragged(0)[0].astype(np.float32), whole.ragged(0)[n]
        assert np.all(np.abs(mine - other) <= 2**-10 * np.abs(other) + 1e-4)


def test_nan_is_never_sent(flawed: Any) -> None:
    inputs = [GOOD, f"{SECRET} loves {NAN}", GOOD, f"{SECRET} {GOOD}"]
    for dtype in ("float32", "float16", "bfloat16"):
        call = lambda dtype=dtype: flawed.embed(inputs, layers="all", dtype=dtype)  # noqa: E731
        refused(InternalError, call, "inputs[1]", "NaN", "weights")
    for pooling in ("mean", "max", Pooling("cls"), Pooling("mean", normalize=True)):
        refused(InternalError, lambda pooling=pooling: flawed.embed(inputs, pooling=pooling), "inputs[1]", "NaN")
    alone = flawed.embed([inputs[n] for n in (0, 2, 3)], pooling="mean").pooled
    results = list(flawed.embed_stream(inputs, pooling="mean"))
    assert [type(result.error) for result in results] == [type(None), InternalError, type(None), type(None)]
    check_message(results[1].error.details, "item 1", "NaN")
    for n, vector in zip((0, 2, 3), alone, strict=True):
        assert np.abs(results[n].embedding.pooled[0] - vector).max() < 1e-5


def test_nan_is_never_sent_layer_by_layer(flawed_server: Server) -> None:
    inputs = [GOOD, f"{SECRET} loves {NAN}", GOOD]
    with Client(flawed_server.address) as client:
        rows: list[np.ndarray] = []

        def drain() -> None:
            for part in client.embed_layers(inputs):
                rows.extend(part.rows)

        refused(InternalError, drain, "inputs[1]", "layer 0", "NaN")
        assert all(np.isfinite(row).all() for row in rows)


def test_neighbours_of_nan_are_unharmed(flawed_server: Server, kind: str) -> None:
    """Good and bad callers at once, so that they share batches."""
    address = flawed_server.address
    with Client(address) as client:
        wanted = client.embed([GOOD] * 20, pooling="mean").pooled

    def good(_: int) -> float:
        client = open_client(kind, address)
        found = client.embed([GOOD] * 20, pooling="mean").pooled
        client.close()
        return float(np.abs(found - wanted).max())

    def bad(_: int) -> type[LayertapError]:
        client = open_client(kind, address)
        with pytest.raises(LayertapError) as caught:
            client.embed([GOOD, NAN] * 10, pooling="mean")
        client.close()
        return type(caught.value)

    with ThreadPoolExecutor(8) as pool:
        goods, bads = pool.map(good, range(16)), pool.map(bad, range(16))
        assert max(goods) < 1e-5
        assert set(bads) == {InternalError}


def test_a_model_without_a_pooler(flawed: Any) -> None:
    assert not flawed.model_info().has_pooler_output
    refused(FailedPreconditionError, lambda: flawed.embed(SECRET, pooler_output=True), "pooler", "cls")
    refused(
        FailedPreconditionError, lambda: list(flawed.embed_stream([SECRET], pooler_output=True, layers=[1])), "pooler"
    )


def test_words_and_mixes_of_a_text_whose_numbers_are_wrong(flawed: Any) -> None:
    mix = LayerMix("sum", layers=[0, 3])
    for options in ({"words": "first"}, {"words": "mean", "mix": mix}, {"mix": mix}):
        call = lambda options=options: flawed.embed([GOOD, f"{SECRET} {NAN}"], **options)  # noqa: E731
        refused(InternalError, call, "inputs[1]", "layer 3", "NaN")
        good, bad = flawed.embed_stream([GOOD, f"{SECRET} {NAN}"], **options)
        assert good.error is None and type(bad.error) is InternalError
    call = lambda: flawed.embed([OVERFLOWING], layers=[0], words="first", dtype="float16")  # noqa: E731
    refused(OutOfRangeError, call, "inputs[0]", "float16")


def test_an_answer_too_large_for_embed_is_no_concern_of_the_sdk(flawed: Any) -> None:
    assert flawed.embed(["paris " * 510], layers="all").hidden_states[3].shape == (1, 512, 32)


def test_an_answer_too_large_for_tokenize(flawed_server: Server) -> None:
    with grpc.insecure_channel(flawed_server.address) as channel:
        stub = Stub(channel)
        request = pb.TokenizeRequest(inputs=[pb.Input(text="paris " * 500)] * 10)
        raw_refused(grpc.StatusCode.INVALID_ARGUMENT, lambda: stub.Tokenize(request), "65536", "fewer")


def test_texts_that_no_message_holds_together_go_over_a_stream_or_are_refused(flawed: Any) -> None:
    inputs = [f"{SECRET} {GOOD} " * 8] * 1000
    assert flawed.embed(inputs, pooling="mean").pooled.shape == (1000, 32)
    refused(ResourceExhaustedError, lambda: list(flawed.embed_layers(inputs)), "65536")
