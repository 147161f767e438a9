"""Dense, Normalize and Dropout of a model's folder: vectors and token rows equal to those of sentence-transformers."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import safetensors.torch
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Dropout,
    LayerNorm,
    Normalize,
    Pooling,
    Transformer,
)
from support import family, worst
from support.in_process import serving

from layertap import Client, FailedPreconditionError
from layertap.v1 import embedding_pb2 as pb
from layertap.v1 import embedding_pb2_grpc
from layertap_server.model import sentence_config, sentence_modules
from layertap_server.model.sentence_config import SentenceConfig

BOUND = 1e-5
TEXTS = ["I love Paris", "", "two words", "The quick brown fox jumps over the lazy dog. " * 9, "a <pad> [PAD] b"]
TOKENS = "token_embeddings"


def dense(in_size: int, out_size: int, activation: Any = None, **options: Any) -> Dense:
    return Dense(in_size, out_size, activation_function=activation or torch.nn.Tanh(), **options)


def of_tokens(in_size: int, out_size: int, activation: Any = None, **options: Any) -> Dense:
    return dense(in_size, out_size, activation, module_input_name=TOKENS, **options)


def every_activation() -> list[Any]:
    names = sorted(sentence_modules._ACTIVATIONS)
    return [dense(32, 32, getattr(torch.nn, name)(), use_residual=True) for name in names]


FOLDERS: dict[str, tuple[str, Callable[[], list[Any]]]] = {
    "after pooling": ("bert", lambda: [Pooling(32, pooling_mode="mean"), dense(32, 24), Normalize()]),
    "joined pools, several, without bias, with residuals": (
        "roberta",
        lambda: [
            Pooling(32, pooling_mode=["cls", "max", "mean"], include_prompt=False),
            dense(96, 48, torch.nn.Identity(), bias=False, use_residual=True),
            Dropout(0.3),
            Normalize(),
            dense(48, 48, torch.nn.GELU(), use_residual=True),
        ],
    ),
    "token rows before pooling": (
        "distilbert",
        lambda: [of_tokens(32, 20), Pooling(20, pooling_mode="max"), dense(20, 7, torch.nn.ReLU())],
    ),
    "late interaction": (
        "electra",
        lambda: [of_tokens(32, 16, torch.nn.Identity(), bias=False), Normalize(module_input_name=TOKENS)],
    ),
    "every activation": ("bert", lambda: [Pooling(32, pooling_mode="mean"), *every_activation()]),
}


def save(folder: Path, kind: str, modules: list[Any], **options: Any) -> Path:
    torch.manual_seed(0)
    plain = family.save(kind, folder / "plain")
    model = SentenceTransformer(modules=[Transformer(str(plain)), *modules], device="cpu", **options)
    model.save(str(folder / "saved"), create_model_card=False)
    return folder / "saved"


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, modules = FOLDERS[request.param]
    return save(tmp_path_factory.mktemp("models"), kind, modules(), prompts={"query": "I say: "})


@pytest.fixture(scope="module")
def judge(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu")


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with serving(folder) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Client]:
    with Client(address) as opened:
        yield opened


@pytest.mark.parametrize(
    "options",
    [{}, {"normalize_embeddings": True}, {"truncate_dim": 5}, {"truncate_dim": 999}, {"prompt_name": "query"}],
)
def test_vectors_are_those_of_sentence_transformers(
    client: Client, judge: SentenceTransformer, options: dict[str, Any]
) -> None:
    if not client.model_info().sentence_config.poolings:
        with pytest.raises(FailedPreconditionError, match="no Pooling"):
            client.encode(TEXTS, **options)
        return
    for given in (TEXTS, TEXTS[0], [*TEXTS, *TEXTS] * 10):
        assert worst(client.encode(given, **options), judge.encode(given, **options)) <= BOUND


@pytest.mark.parametrize("options", [{}, {"prompt": "to "}])
def test_token_rows_are_those_of_sentence_transformers(
    client: Client, judge: SentenceTransformer, options: dict[str, Any]
) -> None:
    found = client.encode(TEXTS, output_value=TOKENS, **options)
    for rows, wanted in zip(found, judge.encode(TEXTS, output_value=TOKENS, **options), strict=True):
        assert worst(rows, wanted.numpy()) <= BOUND


def test_the_model_info_tells_the_sizes(client: Client, judge: SentenceTransformer) -> None:
    config = client.model_info().sentence_config
    assert config.needs_sentence_modules and config.unsupported is None
    assert config.token_size == judge.encode("a", output_value=TOKENS).shape[1]
    assert config.vector_size == (judge.encode("a").shape[0] if config.poolings else 0)


def test_a_text_has_the_same_bits_alone_and_in_any_batch(client: Client) -> None:
    assert client.model_info().batch_invariant
    values = [TOKENS, "sentence_embedding"] if client.model_info().sentence_config.poolings else [TOKENS]
    for value in values:
        together = client.encode([*TEXTS, *TEXTS], output_value=value)
        for n, text in enumerate(TEXTS):
            alone = client.encode(text, output_value=value)
            assert np.array_equal(alone, together[n]) and np.array_equal(alone, together[n + len(TEXTS)])


def test_any_client_of_the_contract_gets_them_beside_other_outputs(address: str, judge: SentenceTransformer) -> None:
    outputs = [
        pb.Output(hidden_states=pb.HiddenStates(layers=[0, -1])),
        pb.Output(hidden_states=pb.HiddenStates(sentence_modules=True)),
    ]
    has_vectors = any(isinstance(module, Pooling) for module in judge)
    if has_vectors:
        outputs.append(pb.Output(pooled_vectors=pb.PooledVectors(sentence_modules=True, dimensions=4)))
    with grpc.insecure_channel(address) as channel:
        request = pb.EmbedRequest(inputs=[pb.Input(text=TEXTS[0])], options=pb.EmbedOptions(outputs=outputs))
        answer = embedding_pb2_grpc.EmbeddingServiceStub(channel).Embed(request)
    tensors = [one.tensor for one in answer.tensors]
    arrays = [np.frombuffer(one.data, "<f4").reshape(tuple(one.shape)) for one in tensors]
    assert [array.shape[1] for array in arrays[:2]] == [32, 32]
    assert worst(arrays[2], judge.encode(TEXTS[0], output_value=TOKENS).numpy()) <= BOUND
    if has_vectors:
        assert worst(arrays[3], judge.encode(TEXTS[:1], truncate_dim=4)) <= BOUND


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (pb.Output(hidden_states=pb.HiddenStates(sentence_modules=True, layers=[0])), "the last layer"),
        (pb.Output(hidden_states=pb.HiddenStates(sentence_modules=True, all_layers=True)), "the last layer"),
        (pb.Output(pooled_vectors=pb.PooledVectors(sentence_modules=True, strategy=2)), "leave strategy"),
        (pb.Output(pooled_vectors=pb.PooledVectors(sentence_modules=True, layer=0)), "leave strategy"),
        (pb.Output(pooled_vectors=pb.PooledVectors(sentence_modules=True, exclude_special_tokens=True)), "leave strat"),
        (pb.Output(pooled_vectors=pb.PooledVectors(sentence_modules=True, dimensions=-1)), "starts at 1"),
    ],
)
def test_what_does_not_go_with_the_modules_is_refused(address: str, output: pb.Output, reason: str) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        request = pb.EmbedRequest(inputs=[pb.Input(text="a")], options=pb.EmbedOptions(outputs=[output]))
        with pytest.raises(grpc.RpcError, match=reason):
            stub.Embed(request)


def test_the_old_layout_is_read_with_its_dense(tmp_path: Path) -> None:
    saved = save(tmp_path, "distilbert", [Pooling(32, pooling_mode="mean"), dense(32, 12)])
    inside = saved / "0_Transformer"
    inside.mkdir()
    described = json.loads((saved / "modules.json").read_text())
    for path in list(saved.iterdir()):
        if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json"):
            shutil.move(path, inside / path.name)
    described[0]["path"] = "0_Transformer"
    for module in described:
        module["type"] = "sentence_transformers.models." + module["type"].rpartition(".")[2]
    (saved / "modules.json").write_text(json.dumps(described))
    (inside / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 11, "do_lower_case": False}))
    (saved / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True})
    )
    judge = SentenceTransformer(str(saved), device="cpu")
    assert judge.max_seq_length == 11
    with serving(saved) as address, Client(address) as client:
        assert worst(client.encode(TEXTS), judge.encode(TEXTS)) <= BOUND


# What is not served.


def read(folder: Path) -> SentenceConfig:
    return sentence_config.read(folder, hidden_size=32, max_length=64, position_count=64, truncation="right")


def config(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "2_Dense" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def only_pickled(folder: Path) -> None:
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")


def takes(size: int) -> Callable[[Path], object]:
    """Writes a Dense whose weights are those of its config, and that takes so many values."""

    def write(folder: Path) -> None:
        config(in_features=size)(folder)
        weights = {"linear.weight": torch.zeros(12, size), "linear.bias": torch.zeros(12)}
        safetensors.torch.save_file(weights, folder / "2_Dense" / "model.safetensors")

    return write


def many(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules + modules[-1:] * 1000))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "an activation of its own": (config(activation_function="my.Own"), "my.Own"),
    "an activation with weights": (config(activation_function="torch.nn.modules.activation.PReLU"), "PReLU"),
    "only pickles": (only_pickled, "safe_serialization"),
    "sizes that do not fit": (config(in_features=31), "not those of its config"),
    "fewer values than there are": (takes(31), "takes 31 values where there are 32"),
    "a huge size": (config(out_features=1_000_000), "[32, 1000000], the most is 16384"),
    "many of them": (many, "has 1003 modules, the most is 32"),
    "a size that is none": (config(in_features="32"), "in_features"),
    "a bias that is not there": (config(use_residual=True), "not those of its config"),
    "another input": (config(module_input_name="all_layer_embeddings"), "something else"),
    "another output": (config(module_output_name="other"), "something else"),
    "token rows after pooling": (config(module_input_name=TOKENS, module_output_name=TOKENS), "after they are pooled"),
    "broken weights": (lambda folder: (folder / "2_Dense" / "model.safetensors").write_bytes(b"x"), "cannot be read"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models"), "bert", [Pooling(32, pooling_mode="mean"), dense(32, 12)])


@pytest.mark.parametrize(("spoil", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_a_dense_that_is_refused_by_name(
    plain: Path, tmp_path: Path, spoil: Callable[[Path], object], named: str
) -> None:
    copied = Path(shutil.copytree(plain, tmp_path / "copied"))
    assert read(copied).unsupported == ""
    spoil(copied)
    found = read(copied).unsupported
    assert "Dense" in found and named in found


def test_a_module_that_is_not_served_is_refused_in_every_way(tmp_path: Path) -> None:
    saved = save(tmp_path, "bert", [Pooling(32, pooling_mode="mean"), LayerNorm(32)])
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(serving(saved))
        client = stack.enter_context(Client(address))
        stub = embedding_pb2_grpc.EmbeddingServiceStub(stack.enter_context(grpc.insecure_channel(address)))
        with pytest.raises(FailedPreconditionError, match="LayerNorm"):
            client.encode("a text")
        for output in (
            pb.Output(hidden_states=pb.HiddenStates(sentence_modules=True)),
            pb.Output(pooled_vectors=pb.PooledVectors(sentence_modules=True)),
        ):
            request = pb.EmbedRequest(inputs=[pb.Input(text="a")], options=pb.EmbedOptions(outputs=[output]))
            with pytest.raises(grpc.RpcError, match="LayerNorm") as caught:
                stub.Embed(request)
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


def test_the_weights_are_in_the_fingerprint(plain: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(plain, tmp_path / "copied"))
    one = read(copied).description
    path = copied / "2_Dense" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert read(copied).description != one and str(tmp_path) not in one
