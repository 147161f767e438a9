"""tritonclient, the client of the Open Inference Protocol, against a server with `--kserve`."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
from tritonclient.utils import InferenceServerException

from layertap import Client, Pooling
from layertap_server.testing import ServerProcess

TEXTS = ["I love Paris", "", "Berlin is larger than Paris, and colder in winter", "東京は大きい"]
LAYERS = 6
POOLS = ("mean", "cls", "max", "last", "mean_sqrt_len", "mean_max")


class BlockingAio:
    """The asyncio client of tritonclient with the face of the other."""

    def __init__(self, address: str) -> None:
        self._runner = asyncio.Runner()
        self._client = self._runner.run(self._make(address))

    async def _make(self, address: str) -> Any:
        return tritonclient.grpc.aio.InferenceServerClient(address)

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self._runner.run(getattr(self._client, name)(*args, **kwargs))

    def stream(self, requests: Sequence[dict[str, Any]]) -> list[tuple[Any, Any]]:
        """Sends requests over one stream; returns result and error of each."""

        async def run() -> list[tuple[Any, Any]]:
            async def send() -> AsyncIterator[dict[str, Any]]:
                for request in requests:
                    yield request

            return [pair async for pair in self._client.stream_infer(send())]

        return self._runner.run(run())

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


class Sync(tritonclient.grpc.InferenceServerClient):
    """The other client of tritonclient."""

    def stream(self, requests: Sequence[dict[str, Any]], **options: Any) -> list[tuple[Any, Any]]:
        """Sends requests over one stream; returns result and error of each."""
        answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self.start_stream(callback=lambda result, error: answers.put((result, error)), **options)
        try:
            for request in requests:
                self.async_stream_infer(**request)
            return [answers.get(timeout=60) for _ in requests]
        finally:
            self.stop_stream()


@pytest.fixture(scope="module", params=["sync", "aio"])
def triton(request: pytest.FixtureRequest, server: ServerProcess) -> Iterator[Any]:
    """Each of the two clients of tritonclient."""
    client = Sync(server.address) if request.param == "sync" else BlockingAio(server.address)
    yield client
    client.close()


def tensor(name: str, array: Any, datatype: str) -> Any:
    array = np.asarray(array)
    found = tritonclient.grpc.InferInput(name, list(array.shape), datatype)
    return found.set_data_from_numpy(array)


def text_tensor(texts: Sequence[str | bytes]) -> Any:
    return tensor("text", np.array(texts, object), "BYTES")


def ids_tensors(**arrays: Any) -> list[Any]:
    return [tensor(name, np.array(array, np.int64), "INT64") for name, array in arrays.items()]


def wanted(*names: str) -> list[Any]:
    return [tritonclient.grpc.InferRequestedOutput(name) for name in names]


def same(found: Any, expected: Any) -> bool:
    return found.dtype == expected.dtype and np.array_equal(found, expected)


def refused(triton: Any, code: str, words: str, *args: Any, **options: Any) -> None:
    """Checks the code of a refusal and its words, and that the server still answers."""
    with pytest.raises(InferenceServerException) as caught:
        triton.infer(*args, **options)
    assert caught.value.status() == f"StatusCode.{code}"
    assert words in caught.value.message()
    assert triton.is_server_ready()


# The server and its model.


def test_the_server_and_its_model_are_live_and_ready(triton: Any, model: str) -> None:
    assert triton.is_server_live() and triton.is_server_ready()
    assert triton.is_model_ready(model) and triton.is_model_ready(model, "1")
    assert not triton.is_model_ready("another") and not triton.is_model_ready(model, "2")


def test_metadata_list_all_inputs_and_outputs(triton: Any, model: str) -> None:
    import layertap

    server = triton.get_server_metadata()
    assert (server.name, server.version) == ("layertap", layertap.__version__)
    found = triton.get_model_metadata(model)
    assert (found.name, list(found.versions), found.platform) == (model, ["1"], "layertap")
    assert {one.name: (one.datatype, list(one.shape)) for one in found.inputs} == {
        "text": ("BYTES", [-1]),
        "input_ids": ("INT64", [-1, -1]),
        "attention_mask": ("INT64", [-1, -1]),
        "token_type_ids": ("INT64", [-1, -1]),
    }
    outputs = {one.name: (one.datatype, list(one.shape)) for one in found.outputs}
    assert outputs.pop("token_counts") == ("INT64", [-1])
    assert outputs.pop("mean_max") == ("FP32", [-1, 768])
    for name in (*(f"hidden_state_{layer}" for layer in range(LAYERS + 1)), "last_hidden_state"):
        assert outputs.pop(name) == ("FP32", [-1, -1, 384])
    for name in ("pooler_output", "sentence_embedding", *POOLS[:-1]):
        assert outputs.pop(name) == ("FP32", [-1, 384])
    assert not outputs


# Numbers.


def test_every_output_has_the_bits_of_the_sdk(triton: Any, client: Client, model: str) -> None:
    layers = [f"hidden_state_{layer}" for layer in range(LAYERS + 1)]
    names = [*layers, "last_hidden_state", "pooler_output", *POOLS, "token_counts"]
    result = triton.infer(model, [text_tensor(TEXTS)], outputs=wanted(*names), request_id="a request")
    assert result.get_response().id == "a request" and result.get_response().model_name == model
    expected = client.embed(TEXTS, layers="all", pooler_output=True, pooling=list(POOLS))
    assert same(result.as_numpy("token_counts"), np.array(expected.token_counts, np.int64))
    for layer, name in enumerate(layers):
        found = result.as_numpy(name)
        assert found.shape == (4, max(expected.token_counts), 384)
        for row, rows in zip(found, expected.ragged(layer), strict=True):
            assert same(row[: len(rows)], rows) and not row[len(rows) :].any()
    assert same(result.as_numpy("last_hidden_state"), result.as_numpy(f"hidden_state_{LAYERS}"))
    assert same(result.as_numpy("pooler_output"), expected.pooler_output)
    for name, pool in zip(POOLS, expected.pools, strict=True):
        assert same(result.as_numpy(name), pool)


def test_token_ids_are_computed_exactly_as_given(triton: Any, client: Client, model: str) -> None:
    ids = {
        "input_ids": [[101, 1045, 2293, 3000, 102, 0], [101, 7592, 102, 0, 0, 0]],
        "attention_mask": [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]],
        "token_type_ids": [[0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]],
    }
    names = wanted("hidden_state_2", "mean", "token_counts")
    result = triton.infer(model, ids_tensors(**ids), outputs=names)
    expected = client.embed(ids, layers=[2], pooling="mean")
    assert same(result.as_numpy("hidden_state_2"), np.stack(expected.ragged(2)))
    assert same(result.as_numpy("mean"), expected.pooled)
    assert result.as_numpy("token_counts").tolist() == [6, 6]
    narrow = [tensor("input_ids", np.array(ids["input_ids"], np.int32), "INT32")]
    alone = client.embed({"input_ids": ids["input_ids"]}, pooling="mean")
    assert same(triton.infer(model, narrow, outputs=wanted("mean")).as_numpy("mean"), alone.pooled)


@pytest.mark.parametrize("normalize", [False, True])
def test_sentence_vectors_have_the_bits_of_encode(triton: Any, client: Client, model: str, normalize: bool) -> None:
    texts = [*TEXTS, "a long text " * 200]
    names, parameters = wanted("sentence_embedding", "token_counts"), {"normalize": normalize}
    result = triton.infer(model, [text_tensor(texts)], outputs=names, parameters=parameters)
    assert same(result.as_numpy("sentence_embedding"), client.encode(texts, normalize_embeddings=normalize))
    assert result.as_numpy("token_counts")[-1] == client.model_info().sentence_config.max_length
    refused(
        triton, "INVALID_ARGUMENT", "in FP32", model, [text_tensor(TEXTS)], outputs=names, parameters={"dtype": "FP16"}
    )


def test_texts_may_come_as_a_column(triton: Any, client: Client, model: str) -> None:
    column = tensor("text", np.array([[text] for text in TEXTS], object), "BYTES")
    found = triton.infer(model, [column], outputs=wanted("cls"))
    assert same(found.as_numpy("cls"), client.embed(TEXTS, pooling="cls").pooled)


def test_parameters_are_those_of_the_sdk(triton: Any, client: Client, model: str) -> None:
    inputs, outputs = [text_tensor(TEXTS)], wanted("mean", "last_hidden_state")
    for truncation in ("right", "left"):
        parameters = {"truncation": truncation, "max_length": 5, "normalize": True}
        found = triton.infer(model, inputs, outputs=outputs, parameters=parameters)
        pooling = client.embed(TEXTS, truncation=truncation, max_length=5, pooling=Pooling("mean", normalize=True))
        assert same(found.as_numpy("mean"), pooling.pooled)
        assert found.as_numpy("last_hidden_state").shape == (4, 5, 384)
    found = triton.infer(model, inputs, outputs=outputs, parameters={"dtype": "FP16"})
    halves = client.embed(TEXTS, pooling="mean", dtype="float16")
    assert same(found.as_numpy("mean"), halves.pooled) and found.as_numpy("mean").dtype == np.float16


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests_are_read(triton: Any, client: Client, model: str, algorithm: str) -> None:
    inputs = [text_tensor(TEXTS * 50)]
    found = triton.infer(model, inputs, outputs=wanted("mean"), compression_algorithm=algorithm)
    assert same(found.as_numpy("mean")[:4], client.embed(TEXTS, pooling="mean").pooled)


def test_a_deadline_ends_a_call(triton: Any, model: str) -> None:
    inputs = [text_tensor(["one two three " * 80] * 64)]
    refused(triton, "DEADLINE_EXCEEDED", "", model, inputs, outputs=wanted("mean"), client_timeout=0.005)


# Streams.


def test_a_stream_answers_in_order_and_goes_on_after_an_error(triton: Any, client: Client, model: str) -> None:
    def request(n: int) -> dict[str, Any]:
        name = "another" if n == 3 else model
        texts = [f"text {n}"] * (n + 1)
        return dict(model_name=name, inputs=[text_tensor(texts)], outputs=wanted("mean"), request_id=str(n))

    answers = triton.stream([request(n) for n in range(8)])
    for n, (result, error) in enumerate(answers):
        if n == 3:
            assert result is None and error.message().startswith("NOT_FOUND: this server has the model")
        else:
            assert error is None and result.get_response().id == str(n)
            assert same(result.as_numpy("mean"), client.embed([f"text {n}"] * (n + 1), pooling="mean").pooled)


def test_a_compressed_stream_with_a_deadline_is_answered(server: ServerProcess, client: Client, model: str) -> None:
    with Sync(server.address) as triton:
        request = dict(model_name=model, inputs=[text_tensor(TEXTS)], outputs=wanted("mean"))
        ((result, error),) = triton.stream([request], compression_algorithm="gzip", stream_timeout=60)
    assert error is None and same(result.as_numpy("mean"), client.embed(TEXTS, pooling="mean").pooled)


def test_a_stream_ends_at_its_deadline(server: ServerProcess) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with Sync(server.address) as triton:
        triton.start_stream(callback=lambda result, error: answers.put((result, error)), stream_timeout=0.05)
        result, error = answers.get(timeout=60)
    assert result is None and error.status() == "StatusCode.DEADLINE_EXCEEDED"


# What is refused.


def test_unknown_models_are_not_found(triton: Any, model: str) -> None:
    inputs = [text_tensor(["a"])]
    refused(triton, "NOT_FOUND", f"has the model {model}", "another", inputs, outputs=wanted("mean"))
    refused(triton, "NOT_FOUND", "version 1", model, inputs, outputs=wanted("mean"), model_version="2")
    with pytest.raises(InferenceServerException, match="has the model"):
        triton.get_model_metadata("another")


def test_outputs_are_refused_with_the_list_of_those_that_there_are(triton: Any, model: str) -> None:
    inputs, names = [text_tensor(["a"])], "hidden_state_6, last_hidden_state, pooler_output, mean, cls"
    refused(triton, "INVALID_ARGUMENT", names, model, inputs, outputs=wanted("mean", "hidden_state_7"))
    refused(triton, "INVALID_ARGUMENT", names, model, inputs)
    refused(triton, "INVALID_ARGUMENT", names, model, inputs, outputs=wanted("token_counts"))
    refused(triton, "INVALID_ARGUMENT", "names mean again", model, inputs, outputs=wanted("mean", "mean"))
    top = [tritonclient.grpc.InferRequestedOutput("mean", class_count=3)]
    refused(triton, "INVALID_ARGUMENT", "has parameters", model, inputs, outputs=top)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([text_tensor([])], "text has no texts"),
        ([text_tensor(["a"] * 1001)], "the most is 1000"),
        ([text_tensor([b"a", b"\xff\xfe"])], "text[1] is not UTF-8 from byte 0 on"),
        ([text_tensor(["x" * 100_001])], "text[0] has 100001 characters, the most is 100000"),
        ([text_tensor(["a b c " * 400])], "text[0] has"),
        ([tensor("text", np.zeros((2, 2), np.float32), "FP32")], "text must be BYTES"),
        ([tensor("texts", np.array(["a"], object), "BYTES")], "one of the names text, input_ids"),
        ([text_tensor(["a"]), *ids_tensors(input_ids=[[101, 102]])], "either text alone, or input_ids"),
        (ids_tensors(attention_mask=[[1, 1]]), "either text alone, or input_ids"),
        (ids_tensors(input_ids=[[101, 30522]]), "ids run from 0 to 30521"),
        (ids_tensors(input_ids=[[101, 1 << 40]]), "entries must fit 32 bits"),
        (ids_tensors(input_ids=[[]]), "texts[0] has no input_ids"),
        (ids_tensors(input_ids=[[101] * 513]), "the most is 512"),
        (ids_tensors(input_ids=[101, 102]), "of shape [text_count, length]"),
        (ids_tensors(input_ids=[[101, 102]], attention_mask=[[1, 1, 1]]), "another shape than input_ids"),
        (ids_tensors(input_ids=[[101, 102]], attention_mask=[[1, 2]]), "from 0 to 1"),
        (ids_tensors(input_ids=[[101, 102]], attention_mask=[[0, 0]]), "nothing to pool over"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_inputs_at_fault_are_refused_by_their_name(triton: Any, model: str, inputs: list[Any], words: str) -> None:
    refused(triton, "INVALID_ARGUMENT", words, model, inputs, outputs=wanted("mean"))


def test_ten_megabytes_are_refused_before_they_are_read(triton: Any, model: str) -> None:
    inputs = [text_tensor(["x" * (10 << 20)])]
    refused(triton, "RESOURCE_EXHAUSTED", "larger than max", model, inputs, outputs=wanted("mean"))


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"truncation": "middle"}, "parameters.truncation must be one of error, right, left"),
        ({"truncation": 1}, "parameters.truncation must be one of"),
        ({"max_length": 513}, "parameters.max_length must be an integer"),
        ({"max_length": 1 << 40}, "parameters.max_length must be an integer"),
        ({"max_length": True}, "parameters.max_length must be an integer"),
        ({"normalize": 1}, "parameters.normalize must be true or false"),
        ({"dtype": "INT8"}, "parameters.dtype must be one of FP32, FP16"),
        ({"temperature": 0.5}, "knows truncation, max_length, normalize, dtype"),
    ],
    ids=str,
)
def test_parameters_at_fault_are_refused(triton: Any, model: str, parameters: dict[str, Any], words: str) -> None:
    inputs = [text_tensor(["a"])]
    refused(triton, "INVALID_ARGUMENT", words, model, inputs, outputs=wanted("mean"), parameters=parameters)


def test_answers_above_the_limit_are_refused_before_they_are_computed(triton: Any, model: str) -> None:
    inputs = [text_tensor(["one two three " * 80] * 64)]
    refused(triton, "INVALID_ARGUMENT", "--max-response-bytes", model, inputs, outputs=wanted("hidden_state_0"))
