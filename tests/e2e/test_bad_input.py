"""What users can get wrong, and what the world can: the exact error, a message that helps, and no other client harmed.

Every text here carries SECRET, which may appear in no error and in no log. Both servers are this file's own: `server`
serves the tiny model; `flawed` a model whose weights go wrong for some tokens, under small limits.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import safetensors.torch
import torch
from support import Server, open_client, running

from layertap import AsyncClient, Client, LayerMix, Pooling, TokenIds
from layertap.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    LayertapError,
    OutOfRangeError,
    ResourceExhaustedError,
    StatusCode,
    UnavailableError,
)
from layertap.v1 import embedding_pb2 as pb
from layertap.v1 import embedding_pb2_grpc

SECRET = "xyzzyplugh"
GOOD = "I love Paris"
PATIENCE_S = 15.0
"""How long what must come at once may take on a busy machine."""

OVERFLOWING, NAN = "rome", "berlin"
"""Words whose rows of the flawed model are wrong: layer 0 exceeds float16; every layer is NaN."""


class Stub:
    """The generated stub, with a deadline on every call: a test may fail, never hang."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.bare = embedding_pb2_grpc.EmbeddingServiceStub(channel)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return functools.partial(getattr(self.bare, name), timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[Server]:
    with running("--device", "cpu", "--model-id", str(tiny_folder), "--log-level", "debug") as started:
        yield started
        _check_log(started)


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
        _check_log(started)


@pytest.fixture(scope="module")
def wanted(server: Server) -> np.ndarray:
    """What a good request gives while nothing is wrong."""
    with Client(server.address) as client:
        return client.embed(GOOD).last_hidden_state


@pytest.fixture
def client(kind: str, server: Server, wanted: np.ndarray) -> Iterator[Any]:
    """Each of the clients; after the test the same client and server still answer a good request as before."""
    opened = open_client(kind, server.address)
    yield opened
    assert np.abs(opened.embed(GOOD).last_hidden_state - wanted).max() < 1e-5
    opened.close()
    _check_log(server)


@pytest.fixture
def flawed(kind: str, flawed_server: Server) -> Iterator[Any]:
    """Each of the clients on the flawed model; after the test it still answers a good request."""
    opened = open_client(kind, flawed_server.address)
    yield opened
    assert np.isfinite(opened.embed(GOOD).last_hidden_state).all()
    opened.close()
    _check_log(flawed_server)


@pytest.fixture
def stub(server: Server, wanted: np.ndarray) -> Iterator[Stub]:
    """For what the SDK would not send; after the test the server still answers."""
    with grpc.insecure_channel(server.address) as channel:
        yield Stub(channel)
    with Client(server.address) as after:
        assert np.abs(after.embed(GOOD).last_hidden_state - wanted).max() < 1e-5
    _check_log(server)


def _refused(kind: type[LayertapError], call: Callable[[], Any], *named: str) -> LayertapError:
    """Checks that a call ends with exactly this error, that it names these words, and that it holds no text."""
    with pytest.raises(LayertapError) as caught:
        call()
    error = caught.value
    assert type(error) is kind
    _check_message(error.details, *named)
    assert str(error) == error.details + (f" (request {error.request_id})" if error.request_id else "")
    cause = error.__cause__
    while cause is not None:
        assert SECRET not in str(cause).lower()
        cause = cause.__cause__
    return error


def _raw_refused(code: grpc.StatusCode, call: Callable[[], Any], *named: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() is code
    _check_message(caught.value.details(), *named)


def _check_log(server: Server) -> None:
    """Checks that the server has logged no text."""
    assert SECRET not in server.log.decode().lower()


def _check_message(message: str, *named: str) -> None:
    for words in named:
        assert words in message, message
    assert SECRET not in message.lower()
    assert "\n" not in message and len(message) < 400


# --- what is not a text ---------------------------------------------------------------------------


@pytest.mark.parametrize("nothing", [[], (), iter(()), np.zeros((0, 4), np.int64)], ids=["list", "tuple", "iter", "2d"])
def test_no_texts(client: Any, nothing: Any) -> None:
    for method in (client.embed, client.tokenize):
        _refused(InvalidArgumentError, lambda method=method: method(nothing), "inputs is empty", "at least one text")


def test_no_texts_among_token_ids(client: Any) -> None:
    _refused(
        InvalidArgumentError, lambda: client.embed(TokenIds(np.zeros((0, 4), np.int64))), "inputs", "at least one text"
    )
    _refused(InvalidArgumentError, lambda: client.embed(TokenIds(np.zeros((2, 0), np.int64))), "inputs[0]", "input_ids")
    _refused(InvalidArgumentError, lambda: client.embed(TokenIds([])), "inputs[0]", "input_ids")


def test_no_texts_in_layers_and_streams(client: Any) -> None:
    _refused(InvalidArgumentError, lambda: list(client.embed_layers([])), "inputs is empty")
    assert list(client.embed_stream([])) == []


@pytest.mark.parametrize(
    "inputs",
    [None, 5, 3.5, True, SECRET.encode(), {SECRET: 1}, object()],
    ids=lambda one: "an object" if type(one) is object else repr(one),
)
def test_inputs_of_another_type(client: Any, inputs: Any) -> None:
    name = type(inputs).__name__
    for method in (client.embed, client.tokenize):
        _refused(InvalidArgumentError, lambda method=method: method(inputs), "inputs", name, "pass")


NO_TEXTS: dict[str, Any] = {
    "none": None,
    "an int": 5,
    "a float": 2.5,
    "bytes": SECRET.encode(),
    "a dict": {SECRET: SECRET},
    "a set": {SECRET},
    "a tuple of three": (SECRET, SECRET, SECRET),
    "a tuple of one": (SECRET,),
    "no tuple": (),
    "a tuple with an int": (SECRET, 1),
    "a tuple with none": (SECRET, None),
    "a list with an int": [SECRET, 1],
    "an int before a word": [1, SECRET],
    "a list with none": [SECRET, None],
    "a list of bytes": [SECRET.encode()],
    "an empty list": [],
    "an empty array": np.zeros(0, np.int64),
    "floats": [101.0, 102.5],
    "an array of floats": np.array([101.0, 102.0]),
    "an array of objects": np.array([101, SECRET, None], object),
    "an array of one number": np.array(101),
    "an array of two dimensions": np.array([[101, 102]]),
    "a list of lists": [[101, 102], [101, 102]],
    "a ragged list of lists": [[101, 102], [101]],
    "a list of pairs": [(SECRET, SECRET)],
    "an id of 33 bits": [101, 2**31],
    "an id of 80 bits": [101, 2**80],
    "a very negative id": [101, -(2**31) - 1],
    "nan": [float("nan")],
    "a lone surrogate": SECRET + "\ud800",
    "a lone surrogate in a pair": (SECRET, "\udfff"),
    "a lone surrogate among words": [SECRET, "\ud800"],
    "ragged token ids": TokenIds([[101, 102], [101]]),
    "token ids that are a word": TokenIds(SECRET),
    "token ids of floats": TokenIds([101.5]),
    "a batch of token ids": TokenIds([[101, 102]]),
    "a mask of floats": TokenIds([101, 102], [0.5, 1.0]),
    "a mask of words": TokenIds([101, 102], [SECRET, SECRET]),
    "a mask of two dimensions": TokenIds([101, 102], [[1, 1]]),
    "token types of floats": TokenIds([101, 102], None, [0.0, 0.0]),
}


@pytest.mark.parametrize("item", NO_TEXTS.values(), ids=NO_TEXTS.keys())
def test_an_item_that_is_no_text(client: Any, item: Any) -> None:
    inputs = [GOOD, GOOD, item, GOOD]
    _refused(InvalidArgumentError, lambda: client.embed(inputs), "inputs[2]")
    _refused(InvalidArgumentError, lambda: list(client.embed_layers(inputs)), "inputs[2]")
    _refused(InvalidArgumentError, lambda: client.tokenize(inputs), "inputs[2]")
    results = list(client.embed_stream(inputs))
    assert [result.error is None for result in results] == [True, True, False, True]
    assert type(results[2].error) is InvalidArgumentError
    _check_message(results[2].error.details, "[2]")


BAD_BATCHES = {
    "a ragged mask": TokenIds([[101, 102], [101, 102]], [[1, 1], [1]]),
    "a mask of another shape": TokenIds([[101, 102], [101, 102]], [[1, 1]]),
    "types of another shape": TokenIds([[101, 102], [101, 102]], None, [0, 0]),
    "three dimensions": TokenIds(np.ones((2, 2, 2), np.int64)),
    "no dimension": TokenIds(101),
    "a word": TokenIds(SECRET),
    "floats": TokenIds([[101.0, 102.0]]),
}


@pytest.mark.parametrize("batch", BAD_BATCHES.values(), ids=BAD_BATCHES.keys())
def test_a_batch_of_token_ids_that_is_none(client: Any, batch: TokenIds) -> None:
    error = _refused(InvalidArgumentError, lambda: client.embed(batch))
    assert "input_ids" in error.details or "attention_mask" in error.details or "token_type_ids" in error.details


def test_tokens_that_were_tampered_with(client: Any) -> None:
    tokens = client.tokenize([GOOD, f"{SECRET} {GOOD}"], pad_to=20)
    for name, value, named in (
        ("attention_mask", tokens.attention_mask * 2, "inputs[0].attention_mask"),
        ("attention_mask", tokens.attention_mask - 1, "inputs[0].attention_mask"),
        ("attention_mask", tokens.attention_mask / 2, "attention_mask"),
        ("attention_mask", tokens.attention_mask[:, :-1], "inputs[0].attention_mask"),
        ("token_type_ids", tokens.token_type_ids + 2, "inputs[0].token_type_ids"),
        ("input_ids", tokens.input_ids - 1, "inputs[0].input_ids"),
    ):
        broken = dataclasses.replace(tokens, **{name: value})
        _refused(InvalidArgumentError, lambda broken=broken: client.embed(broken), named)


# --- what is too long, too much, too many ---------------------------------------------------------


@pytest.mark.parametrize(
    "huge",
    [SECRET * 600_000, (SECRET * 300_000, SECRET * 300_000), [SECRET * 100] * 6_000],
    ids=["text", "pair", "words"],
)
def test_a_text_of_six_megabytes(client: Any, huge: Any) -> None:
    inputs = [GOOD, huge]
    _refused(InvalidArgumentError, lambda: client.embed(inputs), "inputs[1]", "100000", "split")
    _refused(InvalidArgumentError, lambda: client.tokenize(inputs), "100000", "split")
    good, bad = client.embed_stream(inputs)
    assert good.error is None and type(bad.error) is InvalidArgumentError
    _check_message(bad.error.details, "item 1", "100000", "split")


def test_tokenize_names_the_item_in_a_later_request_too(client: Any) -> None:
    # The SDK asks in several requests; the user counts the texts he passed.
    inputs = ["a"] * 700 + [f"{SECRET} " * 600]
    _refused(InvalidArgumentError, lambda: client.tokenize(inputs), "inputs[700]", "512", "truncation")


def test_a_text_over_the_length(client: Any) -> None:
    inputs = [GOOD, GOOD, f"{SECRET} " + "paris " * 520]
    named = ("inputs[2]", "max_length is 512", "truncation")
    _refused(InvalidArgumentError, lambda: client.embed(inputs), *named)
    _refused(InvalidArgumentError, lambda: list(client.embed_layers(inputs)), *named)
    _refused(InvalidArgumentError, lambda: client.tokenize(inputs), *named)
    _refused(InvalidArgumentError, lambda: client.embed([GOOD, SECRET], max_length=4), "inputs[0]", "5", "is 4")
    _refused(InvalidArgumentError, lambda: client.embed((["paris"] * 600,)), "inputs[0] has 602 tokens", "512")
    _refused(InvalidArgumentError, lambda: client.embed([("paris " * 300, "x " * 300)]), "inputs[0] has 603 tokens")
    found = client.embed(inputs, truncation="right")
    assert found.truncated.tolist() == [False, False, True] and found.token_counts[2] == 512


@pytest.mark.parametrize("truncation", ["error", "right", "left"])
def test_token_ids_over_the_length_are_never_cut(client: Any, truncation: str) -> None:
    inputs = [TokenIds([101, 102]), TokenIds([1045] * 513)]
    _refused(
        InvalidArgumentError, lambda: client.embed(inputs, truncation=truncation), "inputs[1]", "513", "512", "fewer"
    )
    assert client.embed([[1045] * 512], truncation=truncation).token_counts.tolist() == [512]


@pytest.mark.parametrize("max_length", [1, 513, 10**6])
def test_max_length_out_of_range(client: Any, max_length: int) -> None:
    _refused(InvalidArgumentError, lambda: client.embed(SECRET, max_length=max_length), "max_length", "512")


def test_lengths_that_are_no_lengths(client: Any) -> None:
    for value in (0, -1, 2**40, 2.5, "7", [7]):
        _refused(InvalidArgumentError, lambda value=value: client.embed(SECRET, max_length=value), "max_length")
        _refused(InvalidArgumentError, lambda value=value: client.tokenize(SECRET, pad_to=value), "pad_to")
    _refused(InvalidArgumentError, lambda: client.tokenize(SECRET, pad_to=513), "pad_to is 513", "512")
    _refused(InvalidArgumentError, lambda: client.tokenize(SECRET, pad_to=9, max_length=8), "pad_to is 9", "8")


def test_a_pair_that_has_no_room_for_its_special_tokens(client: Any) -> None:
    pair = (SECRET, SECRET)
    call = lambda: client.embed([GOOD, pair], max_length=2, truncation="right")  # noqa: E731
    _refused(InvalidArgumentError, call, "inputs[1]", "3 special tokens", "max_length")


def test_too_many_texts(client: Any) -> None:
    inputs = [SECRET] * 1001
    # Without a timeout they go over a stream, which has none: see test_client_calls.
    for options in ({}, {"pooling": "mean"}):
        call = functools.partial(client.embed, inputs, timeout_s=60.0, **options)
        _refused(InvalidArgumentError, call, "1001", "1000", "embed_stream")
    _refused(InvalidArgumentError, lambda: list(client.embed_layers(inputs)), "1001", "1000", "embed_stream")
    _refused(InvalidArgumentError, lambda: client.decode([[101]] * 1001), "1001", "1000")


def test_too_many_texts_in_one_message(stub: Stub) -> None:
    inputs = [pb.Input(text=SECRET)] * 1001
    tokenize = lambda: stub.Tokenize(pb.TokenizeRequest(inputs=inputs))  # noqa: E731
    _raw_refused(grpc.StatusCode.INVALID_ARGUMENT, tokenize, "1001", "1000")


def test_a_stream_takes_any_number_of_texts_in_one_message(stub: Stub) -> None:
    answers = stub.EmbedStream(iter([_opening(), _texts(*range(1001))]), timeout=60)
    ids = [number for answer in answers for number in answer.results.ids]
    assert ids == list(range(1001))


def test_an_answer_too_large_for_embed(stub: Stub) -> None:
    options = pb.EmbedOptions(outputs=[pb.Output(hidden_states=pb.HiddenStates(all_layers=True))])
    request = pb.EmbedRequest(inputs=[pb.Input(text="paris " * 510)] * 17, options=options)
    _raw_refused(
        grpc.StatusCode.INVALID_ARGUMENT,
        lambda: stub.Embed(request),
        "Embed",
        str((4 << 20) - (64 << 10)),
        "EmbedLayers",
    )
    request = pb.EmbedRequest(inputs=[pb.Input(text="paris " * 510)] * 15, options=options)
    assert len(stub.Embed(request).tensors) == 4


def test_a_unary_answer_of_many_batches(client: Any) -> None:
    found = client.embed(["paris " * 500] * 40, pooling="mean", timeout_s=PATIENCE_S)
    assert found.pooled.shape == (40, 32) and np.ptp(found.pooled, axis=0).max() < 1e-5


def test_an_answer_too_large_for_embed_is_no_concern_of_the_sdk(flawed: Any) -> None:
    assert flawed.embed(["paris " * 510], layers="all").hidden_states[3].shape == (1, 512, 32)


def test_an_answer_too_large_for_tokenize(flawed_server: Server) -> None:
    with grpc.insecure_channel(flawed_server.address) as channel:
        stub = Stub(channel)
        request = pb.TokenizeRequest(inputs=[pb.Input(text="paris " * 500)] * 10)
        _raw_refused(grpc.StatusCode.INVALID_ARGUMENT, lambda: stub.Tokenize(request), "65536", "fewer")


def test_a_message_over_the_limit(flawed: Any) -> None:
    inputs = [f"{SECRET} {GOOD} " * 8] * 1000
    for call in (lambda: flawed.embed(inputs), lambda: list(flawed.embed_layers(inputs))):
        _refused(ResourceExhaustedError, call, "65536")


# --- what is asked for wrongly --------------------------------------------------------------------


@pytest.mark.parametrize("layer", [4, -5, 100, -100, 2**31 - 1, -(2**31)])
def test_a_layer_out_of_range(client: Any, layer: int) -> None:
    limits = ("0 to 3", "-4")
    _refused(InvalidArgumentError, lambda: client.embed(SECRET, layers=[0, layer]), "layers", str(layer), *limits)
    _refused(InvalidArgumentError, lambda: list(client.embed_layers(SECRET, layers=[layer])), str(layer), *limits)
    _refused(InvalidArgumentError, lambda: list(client.embed_stream([SECRET], layers=[layer])), str(layer), *limits)
    poolings = ["mean", Pooling("mean", layer=layer)]
    _refused(InvalidArgumentError, lambda: client.embed(SECRET, pooling=poolings), "outputs[1].layer", *limits)


@pytest.mark.parametrize("layers", ["most", "", True, 1.5, [1.5], ["1"], [None], [], [2**31], [[1]]], ids=repr)
def test_layers_that_are_none(client: Any, layers: Any) -> None:
    _refused(InvalidArgumentError, lambda: client.embed(SECRET, layers=layers), "layers")
    _refused(InvalidArgumentError, lambda: list(client.embed_layers(SECRET, layers=layers)), "layers")


def test_unknown_names(client: Any) -> None:
    for name in ("float64", "FLOAT32", "", None, 32):
        _refused(InvalidArgumentError, lambda name=name: client.embed(SECRET, dtype=name), "dtype", "bfloat16")
    for name in ("middle", "", None, True):
        for method in (client.embed, client.tokenize):
            call = lambda name=name, method=method: method(SECRET, truncation=name)  # noqa: E731
            _refused(InvalidArgumentError, call, "truncation", "left")
    for name in ("median", "", "MEAN"):
        _refused(InvalidArgumentError, lambda name=name: client.embed(SECRET, pooling=name), "pooling", "mean_max")
        _refused(
            InvalidArgumentError, lambda name=name: client.embed(SECRET, pooling=["cls", Pooling(name)]), "pooling"
        )
    for wrong in (5, [5], [None], [["mean"]], {"mean": 1}.items()):
        _refused(InvalidArgumentError, lambda wrong=wrong: client.embed(SECRET, pooling=wrong), "pooling")
    _refused(InvalidArgumentError, lambda: list(client.embed_stream([SECRET], on_error="ignore")), "on_error", "raise")


# --- words and mixes --------------------------------------------------------------------------------


def test_token_ids_have_no_words(client: Any) -> None:
    for ids in ([101, 102], TokenIds([101, 102])):
        named = ("inputs[1]", "token ids", "no words", "hidden_states")
        _refused(InvalidArgumentError, lambda ids=ids: client.embed([GOOD, ids], words="mean"), *named)
        good, bad, last = client.embed_stream([GOOD, ids, [SECRET]], words="mean")
        assert good.error is None and last.error is None and type(bad.error) is InvalidArgumentError
        _check_message(bad.error.details, "item 1", "no words")
    tokens = client.tokenize([GOOD])
    _refused(InvalidArgumentError, lambda: client.embed(tokens, words="first"), "inputs[0]", "token ids")


@pytest.mark.parametrize("words", ["middle", "", "MEAN", True, 1, ["mean"]], ids=repr)
def test_unknown_word_options(client: Any, words: Any) -> None:
    _refused(InvalidArgumentError, lambda: client.embed(SECRET, words=words), "words", "first_last")
    _refused(InvalidArgumentError, lambda: list(client.embed_stream([SECRET], words=words)), "words", "first_last")


BAD_MIXES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "a name": ("mean", ("mix", "LayerMix")),
    "a list": ([-1, -2], ("mix", "LayerMix")),
    "an unknown strategy": (LayerMix("median", layers=[1]), ("strategy", "concat")),
    "no layers": (LayerMix("mean", layers=[]), ("layers", "at least one")),
    "an unknown name of layers": (LayerMix("mean", layers="most"), ("layers", "all")),
    "a layer out of range": (LayerMix("mean", layers=[0, 4]), ("mix.layers has 4", "0 to 3")),
    "a layer twice": (LayerMix("mean", layers=[1, 1]), ("mix.layers", "twice")),
    "a layer by both its names": (LayerMix("concat", layers=[3, 0, -1]), ("mix.layers", "twice")),
    "no weights": (LayerMix("weighted", layers=[1, 2]), ("weights", "0 entries", "2 layers")),
    "too few weights": (LayerMix("weighted", layers="all", weights=[1.0]), ("weights", "1 entry", "4 layers")),
    "weights of a mean": (LayerMix("mean", layers=[1], weights=[1.0]), ("weights", "weighted")),
    "nan": (LayerMix("weighted", layers=[1], weights=[float("nan")]), ("weights", "1000000")),
    "infinity": (LayerMix("weighted", layers=[1], weights=[float("inf")]), ("weights", "1000000")),
    "a huge weight": (LayerMix("weighted", layers=[1], weights=[1e300]), ("weights", "1000000")),
    "weights that are words": (LayerMix("weighted", layers=[1], weights=[SECRET]), ("weights", "numbers")),
    "weights that are not flat": (LayerMix("weighted", layers=[1], weights=[[1.0], []]), ("weights", "flat")),
    "weights that are lists": (LayerMix("weighted", layers=[1], weights=[[1.0]]), ("weights", "numbers")),
    "a weight that is no list": (LayerMix("weighted", layers=[1], weights=2.0), ("weights", "numbers")),
}


@pytest.mark.parametrize(("mix", "named"), BAD_MIXES.values(), ids=BAD_MIXES.keys())
def test_a_mix_that_is_none(client: Any, mix: Any, named: tuple[str, ...]) -> None:
    _refused(InvalidArgumentError, lambda: client.embed(SECRET, mix=mix), *named)
    _refused(InvalidArgumentError, lambda: list(client.embed_stream([SECRET], mix=mix, words="mean")), *named)
    if isinstance(mix, LayerMix):
        pooling = ["mean", Pooling("mean", layer=mix)]
        _refused(
            InvalidArgumentError, lambda: client.embed(SECRET, pooling=pooling), *(n.split(".")[-1] for n in named)
        )


def test_dimensions_of_a_mix_know_its_width(client: Any) -> None:
    wide = LayerMix("concat", layers=[0, 1, 2])
    assert client.embed(SECRET, pooling=Pooling("mean_max", layer=wide, dimensions=192)).pooled.shape == (1, 192)
    pooling = Pooling("mean_max", layer=wide, dimensions=193)
    _refused(InvalidArgumentError, lambda: client.embed(SECRET, pooling=pooling), "dimensions is 193", "1 to 192")


def test_outputs_that_contradict_themselves(stub: Stub) -> None:
    mix = pb.LayerMix(layers=[1])
    both = "both"
    for output, named in (
        (pb.Output(hidden_states=pb.HiddenStates(mix=mix, layers=[1])), (both, "mix")),
        (pb.Output(hidden_states=pb.HiddenStates(mix=mix, all_layers=True)), (both, "mix")),
        (pb.Output(word_vectors=pb.WordVectors(mix=mix, layers=[1])), (both, "mix")),
        (pb.Output(word_vectors=pb.WordVectors(all_layers=True, layers=[1])), (both, "all_layers")),
        (pb.Output(word_vectors=pb.WordVectors(pooling=9)), ("pooling", "9")),
        (pb.Output(pooled_vectors=pb.PooledVectors(mix=mix, layer=1)), (both, "mix")),
        (pb.Output(hidden_states=pb.HiddenStates(mix=pb.LayerMix())), ("mix", "layers", "all_layers")),
        (pb.Output(hidden_states=pb.HiddenStates(mix=pb.LayerMix(layers=[1], all_layers=True))), ("all_layers",)),
        (pb.Output(hidden_states=pb.HiddenStates(mix=pb.LayerMix(layers=[1], strategy=9))), ("strategy", "9")),
    ):
        request = pb.EmbedRequest(inputs=[pb.Input(text=SECRET)], options=pb.EmbedOptions(outputs=[output]))
        call = lambda request=request: stub.Embed(request)  # noqa: E731
        _raw_refused(grpc.StatusCode.INVALID_ARGUMENT, call, "options.outputs[0]", *named)


def test_rows_of_words_count_against_the_limits(stub: Stub, client: Any) -> None:
    # Two tokens, and a row for each of 20000 words: what must be held is told before anything is computed.
    nothing = [""] * 20_000
    options = pb.EmbedOptions(outputs=[pb.Output(word_vectors=pb.WordVectors(all_layers=True))])
    request = pb.EmbedRequest(inputs=[pb.Input(words=pb.Words(words=nothing))], options=options)
    _raw_refused(grpc.StatusCode.INVALID_ARGUMENT, lambda: stub.Embed(request), "Embed", "EmbedLayers")
    concat = LayerMix("concat", layers="all")
    call = lambda: client.embed([GOOD, [""] * 90_000], words="first_last", layers="all", mix=concat)  # noqa: E731
    _refused(InvalidArgumentError, call, "inputs[1]", "bytes", str(128 << 20), "fewer layers")
    assert not client.embed([nothing], words="mean").words[-1].any()


def test_words_and_mixes_of_a_text_whose_numbers_are_wrong(flawed: Any) -> None:
    mix = LayerMix("sum", layers=[0, 3])
    for options in ({"words": "first"}, {"words": "mean", "mix": mix}, {"mix": mix}):
        call = lambda options=options: flawed.embed([GOOD, f"{SECRET} {NAN}"], **options)  # noqa: E731
        _refused(InternalError, call, "inputs[1]", "layer 3", "NaN")
        good, bad = flawed.embed_stream([GOOD, f"{SECRET} {NAN}"], **options)
        assert good.error is None and type(bad.error) is InternalError
    call = lambda: flawed.embed([OVERFLOWING], layers=[0], words="first", dtype="float16")  # noqa: E731
    _refused(OutOfRangeError, call, "inputs[0]", "float16")


@pytest.mark.parametrize("dimensions", [33, 65, 0, -1, 2**31, 2.5, "8"], ids=repr)
def test_dimensions_out_of_range(client: Any, dimensions: Any) -> None:
    pooling = Pooling("mean", dimensions=dimensions)
    _refused(InvalidArgumentError, lambda: client.embed(SECRET, pooling=pooling), "dimensions")
    _refused(InvalidArgumentError, lambda: list(client.embed_stream([SECRET], pooling=pooling)), "dimensions")


def test_dimensions_know_their_limit(client: Any) -> None:
    pooling = Pooling("mean", dimensions=33)
    _refused(InvalidArgumentError, lambda: client.embed(SECRET, pooling=pooling), "dimensions is 33", "1 to 32")
    pooling = Pooling("mean_max", dimensions=65)
    _refused(InvalidArgumentError, lambda: client.embed(SECRET, pooling=pooling), "dimensions is 65", "1 to 64")
    assert client.embed(SECRET, pooling=Pooling("mean_max", dimensions=64)).pooled.shape == (1, 64)


def test_cls_without_special_tokens(client: Any) -> None:
    pooling = [Pooling("mean"), Pooling("cls", include_special_tokens=False)]
    _refused(InvalidArgumentError, lambda: client.embed(SECRET, pooling=pooling), "outputs[1]", "special", "include")


@pytest.mark.parametrize("strategy", ["mean", "max", "last", "mean_sqrt_len", "mean_max"])
def test_an_empty_pool(client: Any, strategy: str) -> None:
    masked = TokenIds([101, 1045, 102], [0, 0, 0])
    _refused(InvalidArgumentError, lambda: client.embed([GOOD, masked], pooling=strategy), "inputs[1]", "unmask")
    bare = Pooling(strategy, include_special_tokens=False)
    for empty in ("", TokenIds([101, 102]), TokenIds([101, 1045, 102], [1, 0, 1])):
        call = lambda empty=empty: client.embed([GOOD, empty], pooling=bare)  # noqa: E731
        _refused(InvalidArgumentError, call, "inputs[1]", "pool", "special tokens")
    good, bad, last = client.embed_stream([GOOD, "", SECRET], pooling=bare)
    assert good.error is None and last.error is None and type(bad.error) is InvalidArgumentError
    _check_message(bad.error.details, "item 1", "pool")


@pytest.mark.parametrize("bad", [30522, -1, 2**31 - 1, -(2**31)])
def test_ids_outside_the_vocabulary(client: Any, bad: int) -> None:
    named = ("inputs[1]", "input_ids[2]", "vocabulary", "30521")
    _refused(InvalidArgumentError, lambda: client.embed([[101], [101, 102, bad, bad]]), *named)
    _refused(InvalidArgumentError, lambda: client.decode([[101], [101, 102, bad]]), "texts[1]", *named[1:])
    good, failed = client.embed_stream([[101], [101, 102, bad]])
    assert good.error is None and type(failed.error) is InvalidArgumentError
    _check_message(failed.error.details, "item 1", "input_ids[2]", "30521")


@pytest.mark.parametrize(
    "ids", [[], "", SECRET, None, [None], [SECRET], [1.5], [2**31], [[1], [None]], [[[1]]], 5.5], ids=repr
)
def test_ids_that_cannot_be_decoded(client: Any, ids: Any) -> None:
    _refused(InvalidArgumentError, lambda: client.decode(ids), "ids")


def test_a_mask_that_does_not_fit(client: Any) -> None:
    ids = [101, 1045, 102]
    for mask in ([1, 1], [1, 1, 1, 1]):
        named = ("inputs[1].attention_mask", str(len(mask)), "3", "equal")
        _refused(InvalidArgumentError, lambda mask=mask: client.embed([GOOD, TokenIds(ids, mask)]), *named)
        named = ("inputs[0].token_type_ids", str(len(mask)), "3", "equal")
        _refused(InvalidArgumentError, lambda mask=mask: client.embed([TokenIds(ids, None, mask)]), *named)
    for mask in ([1, 2, 1], [1, -1, 1], [1, 1, 2**31 - 1]):
        _refused(
            InvalidArgumentError,
            lambda mask=mask: client.embed([GOOD, TokenIds(ids, mask)]),
            "inputs[1].attention_mask",
            "0 to 1",
        )
        _refused(
            InvalidArgumentError,
            lambda mask=mask: client.embed(
                [GOOD, TokenIds(ids, None, mask)] if max(mask) > 1 else [TokenIds(ids, None, mask)]
            ),
            "token_type_ids",
            "0 to 1",
        )


def test_an_empty_mask_is_not_taken_for_none(client: Any) -> None:
    for mask in ([], np.zeros(0, np.int64)):
        item = TokenIds([101, 102], mask)
        _refused(InvalidArgumentError, lambda item=item: client.embed([GOOD, item]), "inputs[1]", "attention_mask")
        item = TokenIds([101, 102], None, mask)
        _refused(InvalidArgumentError, lambda item=item: client.embed([GOOD, item]), "inputs[1]", "token_type_ids")


def test_token_ids_have_no_tokens_to_make(client: Any) -> None:
    _refused(InvalidArgumentError, lambda: client.tokenize([GOOD, [101, 102]]), "inputs[1]", "Decode")


# --- what only the contract can say wrongly -------------------------------------------------------


def _options(**fields: Any) -> pb.EmbedOptions:
    return pb.EmbedOptions(**{"outputs": [pb.Output(pooled_vectors=pb.PooledVectors())]} | fields)


UNKNOWN = {
    "dtype": (_options(dtype=99), ("dtype", "99")),
    "truncation": (_options(truncation=99), ("truncation", "99")),
    "strategy": (
        _options(outputs=[pb.Output(pooled_vectors=pb.PooledVectors(strategy=99))]),
        ("outputs[0]", "strategy", "99"),
    ),
    "no outputs": (_options(outputs=[]), ("outputs", "empty", "at least one")),
    "an output without kind": (
        _options(outputs=[pb.Output(pooled_vectors=pb.PooledVectors()), pb.Output()]),
        ("outputs[1]", "kind", "hidden_states"),
    ),
    "layers and all_layers": (
        _options(outputs=[pb.Output(hidden_states=pb.HiddenStates(layers=[1], all_layers=True))]),
        ("outputs[0]", "layers", "all_layers", "one of them"),
    ),
    "too many outputs": (
        _options(outputs=[pb.Output(pooled_vectors=pb.PooledVectors())] * 65),
        ("outputs", "65", "64", "several requests"),
    ),
    "a negative max_length": (_options(max_length=-1), ("max_length", "-1", "512")),
    "negative dimensions": (
        _options(outputs=[pb.Output(pooled_vectors=pb.PooledVectors(dimensions=-1))]),
        ("outputs[0].dimensions", "-1", "32"),
    ),
}


@pytest.mark.parametrize(("options", "named"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_options_that_the_contract_does_not_know(stub: Stub, options: pb.EmbedOptions, named: tuple[str, ...]) -> None:
    inputs = [pb.Input(text=SECRET)]
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    _raw_refused(invalid, lambda: stub.Embed(pb.EmbedRequest(inputs=inputs, options=options)), *named)
    _raw_refused(invalid, lambda: list(stub.EmbedLayers(pb.EmbedLayersRequest(inputs=inputs, options=options))), *named)
    _stream_refused(stub, [_opening(options), _texts(0)], *named)


def test_enums_that_the_contract_does_not_know(stub: Stub) -> None:
    _stream_refused(stub, [_opening(order=99), _texts(0)], "order", "99")
    request = pb.TokenizeRequest(inputs=[pb.Input(text=SECRET)], truncation=99)
    _raw_refused(grpc.StatusCode.INVALID_ARGUMENT, lambda: stub.Tokenize(request), "truncation", "99")


def test_an_input_without_kind(stub: Stub) -> None:
    inputs = [pb.Input(text=SECRET), pb.Input()]
    named = ("inputs[1]", "kind", "text, pair, words or token_ids")
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    _raw_refused(invalid, lambda: stub.Embed(pb.EmbedRequest(inputs=inputs, options=_options())), *named)
    request = pb.EmbedLayersRequest(inputs=inputs, options=_options())
    _raw_refused(invalid, lambda: list(stub.EmbedLayers(request)), *named)
    _raw_refused(invalid, lambda: stub.Tokenize(pb.TokenizeRequest(inputs=inputs)), *named)
    messages = [_opening(), pb.EmbedStreamRequest(inputs=pb.StreamInputs(inputs=[pb.StreamInput(id=7)]))]
    (failure,) = _failures(stub.EmbedStream(iter(messages)))
    assert (failure.id, failure.code) == (7, StatusCode.INVALID_ARGUMENT)
    _check_message(failure.message, "item 7", "kind")


def test_requests_without_inputs(stub: Stub) -> None:
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    for call in (
        lambda: stub.Embed(pb.EmbedRequest(options=_options())),
        lambda: list(stub.EmbedLayers(pb.EmbedLayersRequest(options=_options()))),
        lambda: stub.Tokenize(pb.TokenizeRequest()),
    ):
        _raw_refused(invalid, call, "inputs is empty", "at least one")
    _raw_refused(invalid, lambda: stub.Decode(pb.DecodeRequest()), "texts is empty", "at least one")
    nothing = pb.EmbedStreamRequest(inputs=pb.StreamInputs())
    (header,) = stub.EmbedStream(iter([_opening(), nothing, nothing]), timeout=60)
    assert header.HasField("header")


def test_no_words_are_the_empty_text(stub: Stub) -> None:
    request = pb.TokenizeRequest(inputs=[pb.Input(words=pb.Words())])
    assert list(stub.Tokenize(request).texts[0].tokens) == ["[CLS]", "[SEP]"]


@pytest.mark.parametrize("rpc", ["GetModelInfo", "Tokenize", "Decode", "Embed", "EmbedLayers", "EmbedStream"])
def test_bytes_that_are_no_request(server: Server, stub: Stub, rpc: str) -> None:
    path = f"/layertap.v1.EmbeddingService/{rpc}"
    # A field of ten bytes that ends after one, and text that is no UTF-8.
    garbage = [b"\x0a\xff" + SECRET.encode()]
    if rpc != "GetModelInfo":
        garbage.append(
            pb.EmbedRequest(inputs=[pb.Input(text=SECRET)]).SerializeToString().replace(b"xyz", b"\xff\xfe\xfd")
        )
    with grpc.insecure_channel(server.address) as channel:
        for raw in garbage if rpc in ("Tokenize", "Embed", "EmbedLayers") else garbage[:1]:
            if rpc == "EmbedStream":
                call = lambda raw=raw: list(channel.stream_stream(path, None, None)(iter([raw]), timeout=PATIENCE_S))  # noqa: E731
            elif rpc == "EmbedLayers":
                call = lambda raw=raw: list(channel.unary_stream(path, None, None)(raw, timeout=PATIENCE_S))  # noqa: E731
            else:
                call = lambda raw=raw: channel.unary_unary(path, None, None)(raw, timeout=PATIENCE_S)  # noqa: E731
            _raw_refused(grpc.StatusCode.INVALID_ARGUMENT, call, f"{rpc}Request", "contract")


def test_an_rpc_that_is_none(server: Server, stub: Stub) -> None:
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary("/layertap.v1.EmbeddingService/Nothing", None, None)
        _raw_refused(grpc.StatusCode.UNIMPLEMENTED, lambda: call(b"", timeout=PATIENCE_S))


# --- EmbedStream ----------------------------------------------------------------------------------


def _opening(options: pb.EmbedOptions | None = None, order: int = 0) -> pb.EmbedStreamRequest:
    return pb.EmbedStreamRequest(options=pb.StreamOptions(options=options or _options(), order=order))


def _texts(*ids: int) -> pb.EmbedStreamRequest:
    inputs = [pb.StreamInput(id=number, input=pb.Input(text=SECRET)) for number in ids]
    return pb.EmbedStreamRequest(inputs=pb.StreamInputs(inputs=inputs))


def _failures(responses: Any) -> list[pb.StreamFailure]:
    return [failure for response in responses for failure in response.results.failures]


def _stream_refused(stub: Stub, messages: list[pb.EmbedStreamRequest], *named: str) -> None:
    _raw_refused(grpc.StatusCode.INVALID_ARGUMENT, lambda: list(stub.EmbedStream(iter(messages))), *named)


def test_a_stream_opens_with_its_options_once(stub: Stub) -> None:
    _stream_refused(stub, [_texts(0)], "first message", "options")
    _stream_refused(stub, [], "first message", "options")
    _stream_refused(stub, [pb.EmbedStreamRequest()], "first message", "options")
    _stream_refused(stub, [_opening(), _opening()], "options", "inputs")
    _stream_refused(stub, [_opening(), _texts(0), _opening()], "options", "inputs")
    _stream_refused(stub, [_opening(), pb.EmbedStreamRequest()], "inputs")


def test_ids_that_are_in_flight_twice(stub: Stub) -> None:
    _stream_refused(stub, [_opening(), _texts(3, 5, 3)], "id 3", "anew")
    # Answered ids may come again: a caller that waits for the answer can number from 0 each time.
    answered = threading.Event()

    def messages() -> Iterator[pb.EmbedStreamRequest]:
        yield _opening()
        yield _texts(3)
        assert answered.wait(PATIENCE_S)
        yield _texts(3)

    ids = []
    for response in stub.EmbedStream(messages()):
        ids += response.results.ids
        if ids:
            answered.set()
    assert ids == [3, 3]


@pytest.mark.parametrize("ordered", [True, False])
def test_a_bad_item_in_a_stream_is_answered_in_band(client: Any, ordered: bool) -> None:
    bad = {
        5: ("paris " * 600, InvalidArgumentError),
        17: ([30522], InvalidArgumentError),
        40: (None, InvalidArgumentError),
        77: (SECRET * 20_000, InvalidArgumentError),
        99: (TokenIds([101, 102], [1]), InvalidArgumentError),
    }
    inputs = [bad[n][0] if n in bad else f"{SECRET} number {n}" for n in range(100)]
    results = list(client.embed_stream(inputs, pooling="mean", ordered=ordered))
    assert sorted(result.index for result in results) == list(range(100))
    if ordered:
        assert [result.index for result in results] == list(range(100))
    good = [n for n in range(100) if n not in bad]
    alone = client.embed([inputs[n] for n in good], pooling="mean").pooled
    for result in results:
        if result.index in bad:
            assert type(result.error) is bad[result.index][1]
            _check_message(result.error.details, str(result.index))
            with pytest.raises(InvalidArgumentError):
                _ = result.embedding
        else:
            assert result.error is None
            assert np.abs(result.embedding.pooled[0] - alone[good.index(result.index)]).max() < 1e-5


def test_a_stream_may_raise_what_is_wrong(server: Server, kind: str, wanted: np.ndarray) -> None:
    inputs = [GOOD, GOOD, f"{SECRET} " + "paris " * 600, GOOD]
    came: list[int] = []

    def drain() -> None:
        with Client(server.address) as client:
            for result in client.embed_stream(inputs, on_error="raise"):
                came.append(result.index)

    async def adrain() -> None:
        async with AsyncClient(server.address) as client:
            async for result in client.embed_stream(inputs, on_error="raise"):
                came.append(result.index)

    call = drain if kind == "sync" else lambda: asyncio.run(adrain())
    _refused(InvalidArgumentError, call, "2", "tokens", "512")
    assert came == [0, 1]


# --- what the model does wrong --------------------------------------------------------------------


def test_the_flawed_model_is_flawed_as_intended(flawed: Any) -> None:
    layer = flawed.embed([GOOD, f"I love {OVERFLOWING}"], layers=[0]).hidden_states[0]
    assert np.isfinite(layer).all()
    assert np.abs(layer[0]).max() < 65504 < np.abs(layer[1]).max()


def test_a_value_that_does_not_fit_float16(flawed: Any) -> None:
    inputs = [f"{SECRET} {GOOD}", GOOD, f"{SECRET} loves {OVERFLOWING}", GOOD]
    named = ("inputs[2]", "layer 0", "float16", "float32")
    _refused(OutOfRangeError, lambda: flawed.embed(inputs, layers=[0], dtype="float16"), *named)
    _refused(OutOfRangeError, lambda: list(flawed.embed_layers(inputs, layers=[0], dtype="float16")), *named)
    pooling = Pooling("max", layer=0)
    _refused(OutOfRangeError, lambda: flawed.embed(inputs, pooling=pooling, dtype="float16"), *named)
    whole = flawed.embed(inputs, layers=[0])
    wide = flawed.embed(inputs, layers=[0], dtype="bfloat16")
    assert np.isfinite(whole.hidden_states[0]).all() and np.isfinite(wide.hidden_states[0]).all()
    results = list(flawed.embed_stream(inputs, layers=[0], dtype="float16"))
    assert [type(result.error) for result in results] == [type(None), type(None), OutOfRangeError, type(None)]
    _check_message(results[2].error.details, "item 2", "layer 0", "float16", "float32")
    for n in (0, 1, 3):
        mine, other = results[n].embedding.ragged(0)[0].astype(np.float32), whole.ragged(0)[n]
        assert np.all(np.abs(mine - other) <= 2**-10 * np.abs(other) + 1e-4)


def test_nan_is_never_sent(flawed: Any) -> None:
    inputs = [GOOD, f"{SECRET} loves {NAN}", GOOD, f"{SECRET} {GOOD}"]
    for dtype in ("float32", "float16", "bfloat16"):
        call = lambda dtype=dtype: flawed.embed(inputs, layers="all", dtype=dtype)  # noqa: E731
        _refused(InternalError, call, "inputs[1]", "NaN", "weights")
    for pooling in ("mean", "max", Pooling("cls"), Pooling("mean", normalize=True)):
        _refused(InternalError, lambda pooling=pooling: flawed.embed(inputs, pooling=pooling), "inputs[1]", "NaN")
    alone = flawed.embed([inputs[n] for n in (0, 2, 3)], pooling="mean").pooled
    results = list(flawed.embed_stream(inputs, pooling="mean"))
    assert [type(result.error) for result in results] == [type(None), InternalError, type(None), type(None)]
    _check_message(results[1].error.details, "item 1", "NaN")
    for n, vector in zip((0, 2, 3), alone, strict=True):
        assert np.abs(results[n].embedding.pooled[0] - vector).max() < 1e-5


def test_nan_is_never_sent_layer_by_layer(flawed_server: Server) -> None:
    inputs = [GOOD, f"{SECRET} loves {NAN}", GOOD]
    with Client(flawed_server.address) as client:
        rows: list[np.ndarray] = []

        def drain() -> None:
            for part in client.embed_layers(inputs):
                rows.extend(part.rows)

        _refused(InternalError, drain, "inputs[1]", "layer 0", "NaN")
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
    _refused(FailedPreconditionError, lambda: flawed.embed(SECRET, pooler_output=True), "pooler", "cls")
    _refused(
        FailedPreconditionError, lambda: list(flawed.embed_stream([SECRET], pooler_output=True, layers=[1])), "pooler"
    )


# --- what goes wrong on the way -------------------------------------------------------------------


def test_no_server_listens(kind: str) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # Bound and not listening: refused, and no other process can take the port.
        target = f"127.0.0.1:{held.getsockname()[1]}"
        client = open_client(kind, target)
        for call in (
            lambda: client.embed(SECRET),
            lambda: client.embed(SECRET, pooling="mean"),
            lambda: list(client.embed_layers(SECRET)),
            lambda: client.tokenize(SECRET),
            lambda: client.decode([101]),
            lambda: client.model_info(),
            lambda: list(client.embed_stream([SECRET], reconnect_timeout_s=0.2)),
        ):
            began = time.monotonic()
            _refused(UnavailableError, call, target, "layertap-server")
            assert time.monotonic() - began < PATIENCE_S
        client.close()


def test_the_deadline_passes(client: Any) -> None:
    inputs = ["paris " * 500] * 200
    for call in (
        lambda: client.embed(inputs, layers="all", timeout_s=0.01),
        lambda: client.embed(inputs, pooling="mean", timeout_s=0.01),
        lambda: list(client.embed_layers(inputs, timeout_s=0.01)),
        lambda: client.tokenize(["a " * 50_000] * 200, max_length=100_000, timeout_s=0.01),
    ):
        began = time.monotonic()
        _refused(DeadlineExceededError, call, "timeout_s")
        assert time.monotonic() - began < PATIENCE_S


def test_the_deadline_passes_while_a_server_hangs(tiny_folder: Path) -> None:
    """And when it goes on, it has forgotten those who left."""
    with running("--device", "cpu", "--model-id", str(tiny_folder)) as server, Client(server.address) as client:
        client.embed(GOOD)
        server.signal(signal.SIGSTOP)
        try:
            _refused(DeadlineExceededError, lambda: client.embed(SECRET, timeout_s=0.3), "timeout_s", "0.3")
            call = lambda: list(client.embed_stream([SECRET], item_timeout_s=0.3))  # noqa: E731
            _refused(DeadlineExceededError, call, "item_timeout_s", "0.3")
        finally:
            server.signal(signal.SIGCONT)
        assert client.embed(GOOD).token_counts.tolist() == [5]


def test_cancelled_calls_leave_the_server_well(stub: Stub, server: Server) -> None:
    inputs = [pb.Input(text="paris " * 500)] * 500
    options = _options(outputs=[pb.Output(hidden_states=pb.HiddenStates(all_layers=True))])
    unary = stub.bare.Embed.future(pb.EmbedRequest(inputs=inputs, options=_options()))
    unary.cancel()
    assert unary.cancelled()
    rows = stub.EmbedLayers(pb.EmbedLayersRequest(inputs=inputs, options=options))
    assert next(rows).WhichOneof("part") == "header"
    rows.cancel()
    _raw_refused(grpc.StatusCode.CANCELLED, lambda: list(rows))
    stream = stub.EmbedStream(itertools.chain([_opening(options)], (_texts(n) for n in itertools.count())))
    assert next(stream).WhichOneof("part") == "header"
    assert next(stream).WhichOneof("part") == "results"
    stream.cancel()
    _raw_refused(grpc.StatusCode.CANCELLED, lambda: list(stream))


def test_a_cancelled_task_is_cancelled(client: Any, server: Server) -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as other:
            inputs = ["paris " * 500] * 500
            task = asyncio.create_task(other.embed(inputs, layers="all"))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(task), 0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await other.embed(GOOD)).token_counts.tolist() == [5]

    asyncio.run(main())


def test_leaving_an_iteration_ends_the_call(client: Any, server: Server) -> None:
    inputs = ["paris " * 500] * 500
    with Client(server.address) as other:
        for part in other.embed_layers(inputs):
            assert part.layer == 0
            break
        for result in other.embed_stream(itertools.repeat(GOOD)):
            assert result.error is None
            break
        assert other.embed(GOOD).token_counts.tolist() == [5]


def test_a_server_that_dies_ends_every_call(tiny_folder: Path) -> None:
    """A blocking and an asyncio caller each in the middle of layers, of a stream, and of a call not yet answered."""
    server = Server("--device", "cpu", "--model-id", str(tiny_folder))
    inputs = [[101, *[2_000] * 498, 102]] * 300  # 77 MB of layers: more than any buffer on the way holds.
    try:
        began = [threading.Event() for _ in range(6)]

        def layers() -> None:
            with Client(server.address) as client:
                for _ in client.embed_layers(inputs):
                    began[0].set()
                    killed.wait()

        async def alayers() -> None:
            async with AsyncClient(server.address) as client:
                async for _ in client.embed_layers(inputs):
                    began[1].set()
                    await asyncio.to_thread(killed.wait)

        def stream() -> None:
            with Client(server.address) as client:
                for _ in client.embed_stream(itertools.repeat(GOOD), reconnect_timeout_s=0.5):
                    began[2].set()

        async def astream() -> None:
            async with AsyncClient(server.address) as client:
                async for _ in client.embed_stream(itertools.repeat(GOOD), reconnect_timeout_s=0.5):
                    began[3].set()

        def whole() -> None:
            with Client(server.address) as client:
                client.model_info()  # It is connected: what meets a stopped server before that says so in other words.
                began[4].set()
                stopped.wait()
                client.embed([f"{SECRET} {GOOD}"], pooling="mean")

        async def awhole() -> None:
            async with AsyncClient(server.address) as client:
                await client.model_info()
                began[5].set()
                await asyncio.to_thread(stopped.wait)
                await client.embed([f"{SECRET} {GOOD}"], layers="all")

        stopped, killed = threading.Event(), threading.Event()
        with ThreadPoolExecutor(6) as pool:
            late = [pool.submit(whole), pool.submit(lambda: asyncio.run(awhole()))]
            futures = [
                pool.submit(layers),
                pool.submit(lambda: asyncio.run(alayers())),
                pool.submit(stream),
                pool.submit(lambda: asyncio.run(astream())),
            ]
            try:
                assert all([event.wait(PATIENCE_S) for event in began])
                server.signal(signal.SIGSTOP)
                stopped.set()
                assert not wait(late, timeout=0.5).done  # A stopped server answers no call.
            finally:
                server.signal(signal.SIGKILL)
                stopped.set(), killed.set()
            dead_at = time.monotonic()
            for future in [*futures, *late]:
                error = future.exception(timeout=PATIENCE_S)
                assert type(error) is UnavailableError
                _check_message(error.details, server.address)
                assert "broke; repeat the call" in error.details or "layertap-server" in error.details
            assert time.monotonic() - dead_at < PATIENCE_S
    finally:
        server.kill()


def test_a_closed_client(client: Any, kind: str, server: Server) -> None:
    closed = open_client(kind, server.address)
    closed.model_info()
    if kind == "sync":
        closed.close()
        for call in (
            lambda: closed.embed(SECRET),
            lambda: closed.tokenize(SECRET),
            lambda: list(closed.embed_layers(SECRET)),
            lambda: list(closed.embed_stream([SECRET])),
            lambda: closed.model_info(),
        ):
            _refused(FailedPreconditionError, call, "closed", "new one")
        closed.close()  # Twice is once.
        return

    async def main() -> None:
        other = AsyncClient(server.address)
        await other.model_info()
        await other.close()
        await other.close()

        async def layers() -> None:
            async for _ in other.embed_layers(SECRET):
                raise AssertionError("a closed client gave rows")

        async def stream() -> None:
            async for _ in other.embed_stream([SECRET]):
                raise AssertionError("a closed client gave a result")

        for make in (lambda: other.embed(SECRET), lambda: other.tokenize(SECRET), other.model_info, layers, stream):
            with pytest.raises(FailedPreconditionError, match=r"closed.*new one"):
                await make()

    closed.close()
    asyncio.run(main())
