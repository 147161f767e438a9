"""Calls of both clients: metadata, request ids, one connection, proxies, requests above the server's limit."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import grpc
import numpy as np
import pytest
from support import Server

import layertap
from layertap import Client, InvalidArgumentError, ResourceExhaustedError, UnavailableError

TEXTS = [f"text {n} " + "word " * (n % 5) for n in range(1100)]
"""More than one request may hold."""

HUGE = "x" * (9 << 20)
"""More than any message may hold."""


def test_results_have_the_request_id_that_was_sent(tiny: Any) -> None:
    for name, ask in (
        ("a", lambda **call: tiny.embed("x", pooling="mean", **call)),
        ("b", lambda **call: tiny.embed("x", **call)),
        ("c", lambda **call: tiny.tokenize("x", **call)),
    ):
        assert ask(metadata={"x-request-id": name}).request_id == name
    assert tiny.embed("x").request_id


def test_more_texts_than_one_request_holds_go_over_a_stream(tiny: Any) -> None:
    whole = tiny.embed(TEXTS, layers=[0, -1], pooling="mean", words="mean", return_tokens=True)
    assert len(whole) == len(whole.tokens) == len(whole.words) == len(TEXTS)
    part = tiny.embed(TEXTS[:40], layers=[0, -1], pooling="mean", words="mean", return_tokens=True)
    assert np.abs(whole.pooled[:40] - part.pooled).max() <= 2e-5
    for layer in (0, -1):
        for one, other in zip(whole.words.ragged(layer)[:40], part.words.ragged(layer), strict=True):
            assert np.abs(one - other).max() <= 2e-5
    assert whole.tokens.input_ids[:40, :5].tolist() == part.tokens.input_ids[:, :5].tolist()
    assert whole.token_counts[:40].tolist() == part.token_counts.tolist()


def test_a_deadline_forbids_that_and_the_error_names_the_way_out(tiny: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"1100 texts.*1000.*embed_stream with item_timeout_s"):
        tiny.embed(TEXTS, pooling="mean", timeout_s=20.0)


def test_texts_that_are_too_long_for_one_request_together_go_over_a_stream(tiny: Any) -> None:
    long = ["x" * 10_000] * 900
    whole = tiny.embed([*long, "I love Paris"], pooling="mean")
    assert (
        len(whole) == 901
        and np.abs(whole.pooled[-1] - tiny.embed("I love Paris", pooling="mean").pooled[0]).max() <= 2e-5
    )


def test_a_text_that_no_message_holds_is_an_error_of_its_own_and_ends_no_stream(tiny: Any) -> None:
    results = list(tiny.embed_stream(["a", HUGE, ["b", HUGE], "y" * 90_000, "c"], pooling="mean"))
    assert [type(result.error) for result in results[1:3]] == [InvalidArgumentError] * 2
    assert [result.index for result in results if result.error is None] == [0, 3, 4]
    assert "item 1 has 9437189 bytes, the most of a request is 8388608; split it" in str(results[1].error)


def test_one_request_that_is_too_large_names_the_way_out(tiny: Any) -> None:
    for ask in (tiny.tokenize, tiny.embed):
        with pytest.raises(
            ResourceExhaustedError, match=r"too large for one message; send .* shorter texts: .*8388608"
        ):
            ask(HUGE)


def test_loopback_never_goes_by_a_proxy(tiny_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("no_grpc_proxy", raising=False)
    with Client(tiny_server.address, token="t0") as client:
        assert client.embed("x").layers == (3,)
    with Client("10.255.255.1:1", retries=0) as client, pytest.raises(UnavailableError, match=r"grpc_proxy.*no_proxy"):
        client.model_info(timeout_s=20.0)


def test_all_calls_of_a_client_share_one_connection_and_name_its_version() -> None:
    seen: list[tuple[str, str]] = []

    def note(context: Any) -> None:
        seen.append((context.peer(), dict(context.invocation_metadata())["user-agent"]))

    def refuse(_: Any, context: Any) -> bytes:
        note(context)
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "refused by the test")
        raise AssertionError

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        rpcs = {
            "Decode": grpc.unary_unary_rpc_method_handler(refuse),
            "EmbedStream": grpc.stream_stream_rpc_method_handler(refuse),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("layertap.v1.EmbeddingService", rpcs),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with Client(f"127.0.0.1:{port}") as client:
            for _ in range(2):
                with pytest.raises(InvalidArgumentError):
                    client.decode([1])
                with pytest.raises(InvalidArgumentError):
                    list(client.embed_stream(["x"], pooling="mean"))
        server.stop(None).wait(30.0)
    assert len(seen) >= 4 and len({peer for peer, _ in seen}) == 1
    assert all(agent.startswith(f"layertap/{layertap.__version__} ") for _, agent in seen)
