"""What users can get wrong: each method of both clients gives the exact error, a message that helps, and goes on.

Each fault has its own test where it is found: `test_wrong_arguments` of the client, `test_preprocess` of the server.
Every text here carries SECRET, which may appear in no error and in no log.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Server, open_client, running
from support.refusals import GOOD, PATIENCE_S, SECRET, check_message, refused

from layertap import AsyncClient, Client, LayerMix, Pooling, TokenIds
from layertap.errors import InvalidArgumentError


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[Server]:
    with running("--device", "cpu", "--model-id", str(tiny_folder), "--log-level", "debug") as started:
        yield started


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
    assert SECRET not in server.log.decode().lower()


def test_no_texts(client: Any) -> None:
    for call in (client.embed, client.tokenize, lambda inputs: list(client.embed_layers(inputs))):
        refused(InvalidArgumentError, lambda call=call: call([]), "inputs is empty", "at least one text")
    assert list(client.embed_stream([])) == []


@pytest.mark.parametrize(
    "item", [None, {SECRET: SECRET}, TokenIds([101, 102], [0.5, 1.0])], ids=["none", "dict", "mask"]
)
def test_an_item_that_is_no_text(client: Any, item: Any) -> None:
    inputs = [GOOD, GOOD, item, GOOD]
    refused(InvalidArgumentError, lambda: client.embed(inputs), "inputs[2]")
    refused(InvalidArgumentError, lambda: list(client.embed_layers(inputs)), "inputs[2]")
    refused(InvalidArgumentError, lambda: client.tokenize(inputs), "inputs[2]")
    results = list(client.embed_stream(inputs))
    assert [result.error is None for result in results] == [True, True, False, True]
    assert type(results[2].error) is InvalidArgumentError
    check_message(results[2].error.details, "[2]")


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
        refused(InvalidArgumentError, lambda broken=broken: client.embed(broken), named)


@pytest.mark.parametrize(
    "huge",
    [SECRET * 600_000, (SECRET * 300_000, SECRET * 300_000), [SECRET * 100] * 6_000],
    ids=["text", "pair", "words"],
)
def test_a_text_of_six_megabytes(client: Any, huge: Any) -> None:
    inputs = [GOOD, huge]
    refused(InvalidArgumentError, lambda: client.embed(inputs), "inputs[1]", "100000", "split")
    refused(InvalidArgumentError, lambda: client.tokenize(inputs), "100000", "split")
    good, bad = client.embed_stream(inputs)
    assert good.error is None and type(bad.error) is InvalidArgumentError
    check_message(bad.error.details, "item 1", "100000", "split")


def test_tokenize_names_the_item_in_a_later_request_too(client: Any) -> None:
    # The SDK asks in several requests; the user counts the texts he passed.
    inputs = ["a"] * 700 + [f"{SECRET} " * 600]
    refused(InvalidArgumentError, lambda: client.tokenize(inputs), "inputs[700]", "512", "truncation")


def test_a_text_over_the_length(client: Any) -> None:
    inputs = [GOOD, GOOD, f"{SECRET} " + "paris " * 520]
    named = ("inputs[2]", "max_length is 512", "truncation")
    refused(InvalidArgumentError, lambda: client.embed(inputs), *named)
    refused(InvalidArgumentError, lambda: list(client.embed_layers(inputs)), *named)
    refused(InvalidArgumentError, lambda: client.tokenize(inputs), *named)
    found = client.embed(inputs, truncation="right")
    assert found.truncated.tolist() == [False, False, True] and found.token_counts[2] == 512


def test_too_many_texts(client: Any) -> None:
    inputs = [SECRET] * 1001
    # Without a timeout they go over a stream, which has none: see test_client_calls.
    for options in ({}, {"pooling": "mean"}):
        call = functools.partial(client.embed, inputs, timeout_s=60.0, **options)
        refused(InvalidArgumentError, call, "1001", "1000", "embed_stream")
    refused(InvalidArgumentError, lambda: list(client.embed_layers(inputs)), "1001", "1000", "embed_stream")
    refused(InvalidArgumentError, lambda: client.decode([[101]] * 1001), "1001", "1000")


def test_a_unary_answer_of_many_batches(client: Any) -> None:
    found = client.embed(["paris " * 500] * 40, pooling="mean", timeout_s=PATIENCE_S)
    assert found.pooled.shape == (40, 32) and np.ptp(found.pooled, axis=0).max() < 1e-5


OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a name": ({"dtype": "float64"}, ("dtype", "bfloat16")),
    "max_length": ({"max_length": 513}, ("max_length", "513", "2 to 512")),
    "a layer": ({"layers": [0, 4]}, ("layers has 4", "0 to 3", "-4")),
    "a layer of a pooling": ({"pooling": ["mean", Pooling("mean", layer=4)]}, ("outputs[1].layer", "0 to 3")),
    "a mix": ({"mix": LayerMix("concat", layers=[3, 0, -1])}, ("mix.layers", "twice")),
    "dimensions": ({"pooling": Pooling("mean_max", dimensions=65)}, ("dimensions is 65", "1 to 64")),
    "cls": ({"pooling": Pooling("cls", include_special_tokens=False)}, ("outputs[0]", "special", "include")),
}


@pytest.mark.parametrize(("options", "named"), OPTIONS.values(), ids=OPTIONS.keys())
def test_an_option_at_fault(client: Any, options: dict[str, Any], named: tuple[str, ...]) -> None:
    refused(InvalidArgumentError, lambda: client.embed(SECRET, **options), *named)
    refused(InvalidArgumentError, lambda: list(client.embed_stream([SECRET], **options)), *named)
    if not {"pooling", "mix"} & options.keys():
        refused(InvalidArgumentError, lambda: list(client.embed_layers(SECRET, **options)), *named)


def test_padding_out_of_range(client: Any) -> None:
    for value in (0, -1, 2**40, 2.5, "7", [7]):
        refused(InvalidArgumentError, lambda value=value: client.tokenize(SECRET, pad_to=value), "pad_to")
    refused(InvalidArgumentError, lambda: client.tokenize(SECRET, pad_to=513), "pad_to is 513", "512")
    refused(InvalidArgumentError, lambda: client.tokenize(SECRET, pad_to=9, max_length=8), "pad_to is 9", "8")


def test_rows_of_words_count_against_the_limits(client: Any) -> None:
    concat = LayerMix("concat", layers="all")
    call = lambda: client.embed([GOOD, [""] * 90_000], words="first_last", layers="all", mix=concat)  # noqa: E731
    refused(InvalidArgumentError, call, "inputs[1]", "bytes", str(128 << 20), "fewer layers")
    assert not client.embed([[""] * 20_000], words="mean").words[-1].any()


@pytest.mark.parametrize("bad", [30522, -1])
def test_ids_outside_the_vocabulary(client: Any, bad: int) -> None:
    named = ("inputs[1]", "input_ids[2]", "vocabulary", "30521")
    refused(InvalidArgumentError, lambda: client.embed([[101], [101, 102, bad, bad]]), *named)
    refused(InvalidArgumentError, lambda: client.decode([[101], [101, 102, bad]]), "texts[1]", *named[1:])


def test_token_ids_have_no_tokens_to_make(client: Any) -> None:
    refused(InvalidArgumentError, lambda: client.tokenize([GOOD, [101, 102]]), "inputs[1]", "Decode")


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
            check_message(result.error.details, str(result.index))
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
    refused(InvalidArgumentError, call, "2", "tokens", "512")
    assert came == [0, 1]
