"""A user's program that touches all of the public SDK: type checkers judge it, and a test runs it.

Only what a user can import is used, and nothing is cast or ignored.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any, assert_type

import grpc
import grpc.aio
import numpy as np
import numpy.typing as npt

import layertap
from layertap import (
    TLS,
    AsyncClient,
    Attentions,
    Client,
    Embedding,
    HiddenStates,
    InvalidArgumentError,
    LayerMix,
    LayerRows,
    LayertapError,
    Limits,
    MixedRows,
    ModelInfo,
    ModelRef,
    Pooling,
    ResourceExhaustedError,
    SentenceConfig,
    Spanned,
    SpanVectors,
    StatusCode,
    StreamResult,
    Timings,
    TokenIds,
    Tokens,
    TorchEmbedding,
    Windows,
    Words,
)

Floats = npt.NDArray[np.float32] | npt.NDArray[np.float16]

ERRORS: dict[StatusCode, type[LayertapError]] = {
    StatusCode.CANCELLED: layertap.CancelledError,
    StatusCode.UNKNOWN: layertap.UnknownError,
    StatusCode.INVALID_ARGUMENT: layertap.InvalidArgumentError,
    StatusCode.DEADLINE_EXCEEDED: layertap.DeadlineExceededError,
    StatusCode.NOT_FOUND: layertap.NotFoundError,
    StatusCode.ALREADY_EXISTS: layertap.AlreadyExistsError,
    StatusCode.PERMISSION_DENIED: layertap.PermissionDeniedError,
    StatusCode.RESOURCE_EXHAUSTED: layertap.ResourceExhaustedError,
    StatusCode.FAILED_PRECONDITION: layertap.FailedPreconditionError,
    StatusCode.ABORTED: layertap.AbortedError,
    StatusCode.OUT_OF_RANGE: layertap.OutOfRangeError,
    StatusCode.UNIMPLEMENTED: layertap.UnimplementedError,
    StatusCode.INTERNAL: layertap.InternalError,
    StatusCode.UNAVAILABLE: layertap.UnavailableError,
    StatusCode.DATA_LOSS: layertap.DataLossError,
    StatusCode.UNAUTHENTICATED: layertap.UnauthenticatedError,
}


def corpus() -> Iterator[str | tuple[str, str] | list[str]]:
    yield "I love Paris"
    yield "a", "pair"
    yield ["three", "split", "words"]


async def async_corpus() -> AsyncIterator[str]:
    yield "I love Paris"


def look_at_tokens(client: Client) -> Tokens:
    tokens = client.tokenize("I love Paris", pad_to=7, add_special_tokens=True, truncation="right", max_length=9)
    assert_type(tokens, Tokens)
    assert_type(tokens.tokens, list[list[str]])
    for array in (tokens.input_ids, tokens.attention_mask, tokens.token_type_ids, tokens.special_tokens_mask):
        assert_type(array, npt.NDArray[np.int64])
    positions: npt.NDArray[np.int64] = tokens.offset_mapping[:, :, 0] + tokens.word_ids
    assert positions.shape == (len(tokens), 7) and tokens.token_counts.tolist() == [7]
    assert_type(tokens.truncated, npt.NDArray[np.bool_])
    assert_type(client.decode(tokens), list[str])
    assert_type(client.decode([101, 1045, 102], skip_special_tokens=False), list[str])
    return tokens


def look_at_results(embedding: Embedding) -> None:
    states = embedding.hidden_states
    assert_type(states, HiddenStates)
    assert_type(states[-1], Floats)
    assert_type(states[:2], tuple[Floats, ...])
    assert_type(states.layers, tuple[int, ...])
    assert states.absolute(-1) == states.layer_count
    assert_type(states.ragged(-1), list[Floats])
    assert all(layer.shape[0] == len(embedding) for layer in states) and states.layer_count + 1 >= len(states)
    assert states.token_counts is embedding.token_counts
    assert_type(embedding.layers, tuple[int, ...])
    for array in (embedding.last_hidden_state, embedding.pooler_output, *embedding.pools):
        assert_type(array, Floats)
    assert_type(embedding.ragged(0), list[Floats])
    assert_type(embedding.tokens, Tokens)
    assert_type(embedding.truncated, npt.NDArray[np.bool_])
    assert_type(embedding.attention_mask, npt.NDArray[np.int64])
    assert len(embedding.to_tuple()) == 3 and "pooler_output" in [column.name for column in embedding.columns()]
    for one in embedding:
        assert_type(one, Embedding)
        assert len(one) == 1
    assert_type(embedding.request_id, str | None)
    model, timings = embedding.model, embedding.timings
    assert_type(model, ModelRef)
    assert_type(timings, Timings)
    assert timings.queue_time_ns + timings.tokenize_time_ns + timings.compute_time_ns > 0 and model.fingerprint


def look_at_words(embedding: Embedding) -> None:
    words = embedding.words
    assert_type(words, Words)
    assert_type(words[-1], Floats)
    assert_type(words.ragged(words.layers[0]), list[Floats])
    assert_type(words.mixed, MixedRows)
    assert_type(words.mixed.padded, Floats)
    for array in (words.word_counts, *words.piece_counts, *words.offsets, *words.sequence_ids):
        assert_type(array, npt.NDArray[np.int64])
    assert words.word_counts.sum() == sum(map(len, words.offsets)) == sum(map(len, words.strings))
    assert_type(words.strings, tuple[tuple[str, ...], ...])
    for one in words:
        assert_type(one, Words)


def look_at_a_mix(embedding: Embedding) -> None:
    assert_type(embedding.mixed.layers, tuple[int, ...])
    assert [len(rows) for rows in embedding.mixed.ragged()] == embedding.token_counts.tolist()


def look_at_interop(embedding: Embedding) -> None:
    tensors = embedding.to_torch()
    assert_type(tensors, TorchEmbedding)
    assert tensors.last_hidden_state is not None and tensors.last_hidden_state.mean(1).shape[0] == len(embedding)
    assert len(tensors.hidden_states) == len(embedding.hidden_states.to_torch())
    assert tensors.attention_mask.sum() > 0 and tensors.pools and tensors.pooler_output is not None
    for result in (embedding, embedding.tokens):
        assert result.to_arrow() is not None and result.to_pandas() is not None


def look_at_one_array(vectors: Embedding) -> None:
    assert np.asarray(vectors).shape == vectors.pooled.shape
    assert np.from_dlpack(vectors).shape == vectors.pooled.shape


def look_at_a_model(info: ModelInfo) -> None:
    assert_type(info.limits, Limits)
    assert info.limits.max_text_count > 0 and info.layer_count > 0
    assert_type(info.flat(), dict[str, str])
    assert_type(info.devices, tuple[str, ...])
    assert_type(info.special_token_ids, tuple[int, ...])
    assert_type(info.sentence_config, SentenceConfig)


def look_at_sentences(client: Client) -> None:
    assert client.encode("I love Paris").shape == (384,)
    vectors = client.encode(["I love Paris", "Hello"], normalize_embeddings=True, truncate_dim=64, batch_size=8)
    assert vectors.shape == (2, 64)
    assert_type(client.encode(["I love Paris"], None, "query: ", 8), npt.NDArray[Any])
    assert len(client.encode_query("Who plays?")) == len(client.encode_document("A guitar", truncate_dim=384))
    assert client.encode([("I love Paris", "Hello")]).shape == (1, 384)
    ranges = np.stack([vectors.min(0), vectors.max(0)])
    assert layertap.quantize_embeddings(vectors[0], precision="int8", ranges=ranges).dtype == np.int8
    tokens = client.encode(["I love Paris"], output_value="token_embeddings", prompt="query: ")
    assert len(tokens) == 1


def connect(target: str) -> None:
    with Client(target, tls=False, retries=2, timeout_s=20.0, options=[("grpc.keepalive_time_ms", 60_000)]) as client:
        client.wait_until_ready(timeout_s=20.0)
    with Client(f"{target},{target}", tls=TLS(ca="ca.pem", cert="mine.pem", key="mine.key"), token="secret") as client:
        assert "secret" not in repr(client)
    with grpc.insecure_channel(target) as channel, Client.from_channel(channel, timeout_s=20.0) as client:
        assert client.model_info().layer_count > 0


async def connect_async(target: str) -> None:
    async with AsyncClient(target) as client:
        await client.wait_until_ready(timeout_s=20.0)
    async with grpc.aio.insecure_channel(target) as channel, AsyncClient.from_channel(channel) as client:
        assert (await client.model_info()).layer_count > 0


def look_at_a_stream(results: Iterator[StreamResult]) -> None:
    for result in results:
        if result.error is not None:
            assert_type(result.error, LayertapError)
            print(result.index, result.error.code, result.error.details)
        else:
            assert_type(result.embedding.pooled, Floats)


def look_at_errors(client: Client) -> None:
    try:
        client.embed("I love Paris", layers=[99])
    except ResourceExhaustedError as error:
        assert_type(error.retry_after_s, float | None)
    except InvalidArgumentError as error:
        assert_type(error.code, StatusCode)
        assert_type(error.details, str)
        assert ERRORS[error.code] is InvalidArgumentError
    else:
        raise AssertionError("layer 99 was not refused")


def use(target: str, extras: bool) -> None:
    layertap.keep_pages()
    connect(target)
    with Client(target, shared_memory=False) as client:
        look_at_a_model(client.model_info(timeout_s=10.0, metadata={"x-request-id": "sample"}))
        look_at_tokens(client)
        look_at_sentences(client)
        best = Pooling("mean", layer=-2, include_special_tokens=False, normalize=True, dimensions=8)
        embedding = client.embed(
            corpus(), layers="all", pooler_output=True, pooling=["cls", best], dtype="float16", return_tokens=True
        )
        look_at_results(embedding)
        long = client.embed("I love Paris and Rome. " * 4, max_length=8, windows=Windows(stride=2), pooling="mean")
        assert_type(long.window_counts, npt.NDArray[np.int64])
        spans = client.embed([Spanned("I love Paris", [(0, 6), (7, 12)])], span_pooling=["mean", "max"]).spans
        assert_type(spans, SpanVectors)
        assert spans.ragged(1)[0].shape[0] == client.embed("I love Paris", spans=[(0, 1)] * 2).spans.padded.shape[1]
        assert len(client.encode("I love Paris", windows=Windows())) and long.window_counts[0] > 1
        attentions = client.embed("I love Paris", attentions=[-1]).attentions
        assert_type(attentions, Attentions)
        assert attentions[-1].shape == (1, 12, 5, 5)
        ids = np.array([[101, 1045, 2293, 102], [101, 7592, 102, 0]])
        if extras:
            look_at_interop(embedding)
        look_at_one_array(client.embed(TokenIds(ids, ids > 0), pooling=best))
        look_at_one_array(client.embed({"input_ids": ids, "attention_mask": ids > 0}, pooling=best))
        hidden, pooled = client.embed("I love Paris", layers=-1, pooler_output=True).to_tuple()
        assert hidden.shape[-1] == pooled.shape[-1]
        mix = LayerMix("weighted", layers=[-1, -2], weights=[0.75, 0.25])
        look_at_words(client.embed(corpus(), words="mean", layers=[-1], mix=mix))
        look_at_a_mix(client.embed("I love Paris", mix=mix))
        for part in client.embed_layers(["I love Paris"], layers=[0, -1]):
            assert_type(part, LayerRows)
            for text, rows in zip(part.texts, part.rows, strict=True):
                assert_type(text, int)
                assert_type(rows, Floats)
                assert part.layer >= 0
        look_at_a_stream(client.embed_stream(corpus(), pooling="mean", ordered=False, on_error="return"))
        with contextlib.closing(client.embed_stream(corpus(), pooling="mean")) as results:
            assert next(results).index == 0
        look_at_errors(client)
    client.close()


async def use_async(target: str) -> None:
    await connect_async(target)
    async with AsyncClient(target) as client:
        info, tokens = await asyncio.gather(client.model_info(), client.tokenize(["I love Paris"]))
        look_at_a_model(info)
        assert_type(await client.decode(tokens), list[str])
        assert_type(await client.embed(tokens), Embedding)
        assert (await client.encode("I love Paris", precision="ubinary")).shape == (48,)
        async for part in client.embed_layers("I love Paris"):
            assert_type(part, LayerRows)
        async with contextlib.aclosing(client.embed_layers("I love Paris")) as parts:
            assert (await anext(parts)).layer == 0
        async for result in client.embed_stream(async_corpus(), pooling="mean"):
            assert_type(result, StreamResult)
    await client.close()


def main(target: str, *options: str) -> None:
    print(f"layertap {layertap.__version__}")
    use(target, extras="--without-extras" not in options)
    asyncio.run(use_async(target))


if __name__ == "__main__":
    main(*sys.argv[1:])
