"""Every kind of BERT checkpoint against the oracle, and one clear line for each that cannot be served.

A socket adds nothing to most of this: checkpoints are found and run in this process, as `app` does it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from support import BOUND, TINY_SETTINGS, Server, open_client, running, worst, write_settings
from support.oracle import Oracle

from layertap.errors import FailedPreconditionError, InvalidArgumentError
from layertap_server import cli
from layertap_server.config import Config, ConfigError
from layertap_server.engine.encoder import Encoder
from layertap_server.engine.weight_reader import dummy_weights
from layertap_server.model.checkpoint import EMBEDDED_MODEL_NAME, Checkpoint, find
from layertap_server.model.settings import ModelSettings
from layertap_server.model.tokenizer import Tokenizer
from layertap_server.testing import ServerError
from layertap_server.types import Output, OutputKind, Plan, Pool, Run, Strategy, Text

SMALL = {
    "model_type": "bert",
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "hidden_act": "gelu",
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Paris", "paris", "I", "i", "love", "É", "é", "e", "##s", "##S"]
VOCABULARY = WORDS + [f"[unused{n}]" for n in range(60 - len(WORDS))]

NOWHERE = ("--log-level", "warning", "--host", "unix:/tmp/" + "x" * 200)
"""A path too long for a socket, which is found after the model is loaded: no server of these tests ever serves."""

Weights = dict[str, torch.Tensor]


def _save(folder: Path, settings: dict[str, Any], weights: Weights | None = None) -> Path:
    """Writes a checkpoint; without weights those of a new random model whose parts are all in use."""
    write_settings(folder, settings)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    weights = dummy_weights(ModelSettings.of(settings | {"initializer_range": 0.3}), 1) if weights is None else weights
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("models") / "small-bert", SMALL)


@pytest.fixture(scope="module")
def weights(small: Path) -> Weights:
    return safetensors.torch.load_file(small / "model.safetensors")


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    """A folder of the small model that a test may spoil."""
    return Path(shutil.copytree(small, tmp_path / "copied-bert"))


def _find(folder: Path | str, **options: Any) -> Checkpoint:
    return find(
        **{"model_id": str(folder), "revision": "", "name": "", "load_format": "safetensors", "seed": 0} | options
    )


def _oracle(settings: dict[str, Any], weights: Weights) -> transformers.BertModel:
    model = transformers.BertModel(transformers.BertConfig(**settings, attn_implementation="eager"))
    result = model.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys
    assert all(name.startswith("pooler.") or name.endswith("_ids") for name in result.missing_keys)
    return model.float().eval()


def _inputs(settings: dict[str, Any]) -> list[Text]:
    random = np.random.default_rng(0)
    length = settings["max_position_embeddings"]
    texts = []
    for count in (1, 2, 7, 7, 30, length):
        ids = random.integers(0, settings["vocab_size"], count).astype(np.int32)
        types = random.integers(0, settings["type_vocab_size"], count).astype(np.int32)
        mask = random.integers(0, 2, count).astype(np.int32)
        texts += [Text(ids), Text(ids, attention_mask=None if mask.all() else mask), Text(ids, token_type_ids=types)]
    texts.append(Text(ids, attention_mask=np.zeros(length, np.int32)))
    return texts


def _encode(encoder: Encoder, settings: dict[str, Any], texts: list[Text]) -> dict[tuple[int, int], np.ndarray]:
    """Returns the arrays of all layers (output 0) and of the pooler (output 1, if there is one)."""
    size, last = settings["hidden_size"], settings["num_hidden_layers"]
    outputs = [Output(kind=OutputKind.HIDDEN_STATES, layers=tuple(range(last + 1)), row_size=size)]
    if encoder.has_pooler:
        outputs.append(Output(kind=OutputKind.POOLER_OUTPUT, layers=(last,), row_size=size))
    plan = Plan(outputs=tuple(outputs), dtype="float32")
    found = {}
    for rows in encoder.encode([Run(plan=plan, texts=texts)]):
        assert not rows.failures
        found[rows.output_index, rows.layer] = np.frombuffer(rows.data, np.float32).reshape(-1, size)
    return found


@torch.inference_mode()
def _check(folder: Path, settings: dict[str, Any], oracle: transformers.BertModel, *, pooler: bool = True) -> None:
    encoder = Encoder(_find(folder), device="cpu", dtype="float32")
    assert encoder.has_pooler is pooler
    texts = _inputs(settings)
    found = _encode(encoder, settings, texts)
    assert len(found) == settings["num_hidden_layers"] + 1 + pooler
    end = 0
    for n, text in enumerate(texts):
        count = text.token_count
        out = oracle(
            input_ids=torch.from_numpy(text.input_ids).long()[None],
            attention_mask=torch.from_numpy(
                np.ones(count, np.int32) if text.attention_mask is None else text.attention_mask
            )[None],
            token_type_ids=torch.from_numpy(
                np.zeros(count, np.int32) if text.token_type_ids is None else text.token_type_ids
            ).long()[None],
            output_hidden_states=True,
        )
        for layer, wanted in enumerate(out.hidden_states):
            assert worst(found[0, layer][end : end + count], wanted[0].numpy()) <= BOUND, (n, layer)
        if pooler:
            last = settings["num_hidden_layers"]
            assert worst(found[1, last][n], out.pooler_output[0].numpy()) <= BOUND, n
        end += count


# --- kinds of checkpoints -------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gelu_new": {"hidden_act": "gelu_new"},
    "relu": {"hidden_act": "relu"},
    "silu": {"hidden_act": "silu"},
    "gelu_pytorch_tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "heads of 12": {"hidden_size": 36},
    "heads of 5, odd sizes": {"hidden_size": 15, "intermediate_size": 37},
    "one head": {"num_attention_heads": 1},
    "heads of 1": {"num_attention_heads": 24},
    "one token type": {"type_vocab_size": 1},
    "three token types": {"type_vocab_size": 3},
    "one block": {"num_hidden_layers": 1},
    "a large epsilon": {"layer_norm_eps": 1e-2},
    "an odd length": {"max_position_embeddings": 77},
}


@pytest.mark.parametrize("change", SHAPES.values(), ids=SHAPES.keys())
def test_shapes_and_activations(tmp_path: Path, change: dict[str, Any]) -> None:
    settings = SMALL | change
    _save(tmp_path, settings)
    _check(tmp_path, settings, _oracle(settings, safetensors.torch.load_file(tmp_path / "model.safetensors")))


def test_settings_that_are_left_out_have_transformers_defaults(tmp_path: Path) -> None:
    left_out = ("hidden_act", "type_vocab_size", "layer_norm_eps", "pad_token_id")
    settings = {name: value for name, value in SMALL.items() if name not in left_out}
    _save(tmp_path, settings, dummy_weights(ModelSettings.of(SMALL | {"initializer_range": 0.3}), 1))
    oracle = _oracle(settings, safetensors.torch.load_file(tmp_path / "model.safetensors"))
    _check(tmp_path, SMALL, oracle)


def _old(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def _with_heads(weights: Weights) -> Weights:
    """As a checkpoint of BertForPreTraining: a prefix, heads that are not ours, and the positions of old versions."""
    heads = {
        "cls.predictions.bias": torch.randn(60),
        "cls.predictions.transform.LayerNorm.gamma": torch.randn(24),
        "cls.seq_relationship.weight": torch.randn(2, 24),
        "bert.embeddings.position_ids": torch.arange(64)[None],
    }
    return {f"bert.{name}": tensor for name, tensor in weights.items()} | heads


NAMINGS: dict[str, Callable[[Weights], Weights]] = {
    "a prefix and heads": _with_heads,
    "gamma and beta": lambda weights: {_old(name): tensor for name, tensor in weights.items()},
    "a prefix, gamma and beta": lambda weights: {_old(name): tensor for name, tensor in _with_heads(weights).items()},
}


@pytest.mark.parametrize("naming", NAMINGS.values(), ids=NAMINGS.keys())
def test_names_of_weights(tmp_path: Path, weights: Weights, naming: Callable[[Weights], Weights]) -> None:
    _save(tmp_path, SMALL, naming(weights))
    _check(tmp_path, SMALL, _oracle(SMALL, weights))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_stored_in_other_formats(tmp_path: Path, weights: Weights, dtype: torch.dtype) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in weights.items()}
    _save(tmp_path, SMALL, stored)
    _check(tmp_path, SMALL, _oracle(SMALL, {name: tensor.float() for name, tensor in stored.items()}))


def test_sharded_weights(copy: Path, weights: Weights) -> None:
    (copy / "model.safetensors").unlink()
    _oracle(SMALL, weights).save_pretrained(copy, max_shard_size="20KB")
    assert len(list(copy.glob("model-*.safetensors"))) > 2
    assert (copy / "model.safetensors.index.json").is_file() and not (copy / "model.safetensors").exists()
    _check(copy, SMALL, _oracle(SMALL, weights))


def test_no_pooler_weights(copy: Path, weights: Weights) -> None:
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    safetensors.torch.save_file(kept, copy / "model.safetensors")
    _check(copy, SMALL, _oracle(SMALL, kept), pooler=False)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything unusual at once: cased, vocab.txt only, one token type, odd sizes, no pooler."""
    settings = SMALL | {"type_vocab_size": 1, "hidden_size": 15, "intermediate_size": 37, "hidden_act": "gelu_new"}
    weights = dummy_weights(ModelSettings.of(settings | {"initializer_range": 0.3}), 1)
    kept = {f"bert.{name}": tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    folder = _save(tmp_path_factory.mktemp("secret-place") / "odd-bert", settings, kept)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": False, "model_max_length": 64})
    )
    return folder


@pytest.fixture(scope="module")
def odd_address(odd: Path) -> Iterator[str]:
    with running("--device", "cpu", "--model-id", f"{odd}/") as server:
        yield server.address


@pytest.fixture
def odd_client(odd_address: str, kind: str) -> Iterator[Any]:
    client = open_client(kind, odd_address)
    yield client
    client.close()


def test_an_odd_model_over_a_socket(odd_client: Any, odd: Path) -> None:
    texts = ["I love Paris", "", "paris és E", "i LOVE"]
    oracle = Oracle.load(odd)
    found = odd_client.embed(texts, layers="all", return_tokens=True)
    for n, text in enumerate(texts):
        wanted, _ = oracle.text(text)
        for layer, rows in enumerate(wanted):
            assert worst(found.ragged(layer)[n], rows) <= BOUND
    assert found.tokens.tokens[0] == ["[CLS]", "I", "love", "Paris", "[SEP]"]
    assert found.tokens.tokens[2] == ["[CLS]", "paris", "é", "##s", "[UNK]", "[SEP]"]
    assert found.tokens.input_ids[0].tolist() == oracle.ids(texts[0])["input_ids"] + [0]
    with pytest.raises(FailedPreconditionError, match="pooler"):
        odd_client.embed(texts, pooler_output=True)


def test_a_pair_for_a_model_with_one_token_type_is_refused_by_name(odd_client: Any) -> None:
    # The tokenizer gives the second text type 1, of which the model has no row; transformers fails there too.
    with pytest.raises(InvalidArgumentError, match=r"inputs\[1\].*token type"):
        odd_client.embed(["I love Paris", ("I", "love")])
    good, bad = odd_client.embed_stream(["I love Paris", ("I", "love")])
    assert good.error is None and type(bad.error) is InvalidArgumentError
    assert odd_client.tokenize([("I", "love")]).token_type_ids.tolist() == [[0, 0, 0, 1, 1]]


def test_what_the_model_is(odd_client: Any, odd: Path) -> None:
    info = odd_client.model_info()
    assert info.model_id == "odd-bert"  # Its last part: the path of the folder is not part of it.
    assert (info.layer_count, info.hidden_size, info.attention_head_count) == (2, 15, 3)
    assert (info.vocab_size, info.type_vocab_size, info.max_length) == (60, 1, 64)
    assert (info.has_pooler_output, info.devices, info.compute_dtype) == (False, ("cpu",), "float32")
    assert info.special_token_ids == (0, 2, 3) and info.pad_token_id == 0
    assert info.fingerprint == _fingerprint(odd)
    assert odd_client.embed("Paris").model.fingerprint == info.fingerprint


# --- tokenizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cased", [True, False], ids=["cased", "uncased"])
def test_a_tokenizer_from_vocab_txt_alone(copy: Path, cased: bool) -> None:
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": not cased}
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    texts = ["I love Paris", "paris És É e", "[MASK] x", "", "PARIS"]
    theirs = transformers.AutoTokenizer.from_pretrained(str(copy))
    ours = Tokenizer(copy).encode(texts, labels=texts, max_length=64, truncation="error")
    assert [one.text.input_ids.tolist() for one in ours] == theirs(texts)["input_ids"]
    pieces = ours[0].encoding.tokens
    assert pieces == (["[CLS]", "I", "love", "Paris", "[SEP]"] if cased else ["[CLS]", "i", "love", "paris", "[SEP]"])


def test_a_tokenizer_from_vocab_txt_with_no_configuration_at_all(copy: Path) -> None:
    assert not (copy / "tokenizer_config.json").exists()
    theirs = transformers.AutoTokenizer.from_pretrained(str(copy))
    (ours,) = Tokenizer(copy).encode(["I love Paris"], labels=["x"], max_length=64, truncation="error")
    assert ours.text.input_ids.tolist() == theirs("I love Paris")["input_ids"]
    assert ours.text.token_count == 5


def test_a_tokenizer_from_tokenizer_json_alone(copy: Path, tmp_path: Path) -> None:
    transformers.AutoTokenizer.from_pretrained(str(copy)).save_pretrained(tmp_path / "saved")
    (copy / "vocab.txt").unlink()
    shutil.copy(tmp_path / "saved" / "tokenizer.json", copy)
    theirs = transformers.AutoTokenizer.from_pretrained(str(copy))
    (ours,) = Tokenizer(_find(copy).tokenizer_folder).encode(
        ["i love paris é"], labels=["x"], max_length=64, truncation="error"
    )
    assert ours.text.input_ids.tolist() == theirs("i love paris é")["input_ids"]


# --- names, fingerprints, dummies -----------------------------------------------------------------


def test_a_model_is_never_called_by_its_path(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _find(small).name == _find(f"{small}/").name == "small-bert"
    assert _find(small, name="mine").name == "mine"
    monkeypatch.chdir(small)
    assert _find(".").name == _find("./").name == _find("../small-bert").name == "small-bert"
    monkeypatch.chdir(small.parent)
    assert _find("small-bert").name == "small-bert"
    assert _find("").name == EMBEDDED_MODEL_NAME and "/" not in EMBEDDED_MODEL_NAME


def _fingerprint(folder: Path, dtype: str = "float32", **options: Any) -> str:
    found = _find(folder, **options)
    tokenizer = Tokenizer(found.tokenizer_folder)
    config = tokenizer.sentence_config(found)
    return found.fingerprint(tokenizer=tokenizer.description, sentences=config.description, dtype=dtype)


def test_the_fingerprint_tells_models_apart(small: Path, tmp_path: Path, weights: Weights) -> None:
    whole = _fingerprint(small)
    assert len(whole) == 64 and set(whole) <= set("0123456789abcdef")
    seen = {whole, _fingerprint(small, "bfloat16")}

    def changed(change: Callable[[Path], object]) -> str:
        folder = Path(shutil.copytree(small, tmp_path / f"copy-{len(seen)}"))
        assert _fingerprint(folder) == whole  # Another folder with another name, and the same model.
        change(folder)
        return _fingerprint(folder)

    other = {name: tensor.clone() for name, tensor in weights.items()}
    other["encoder.layer.1.output.dense.bias"][3] += 1e-3
    swapped = "\n".join(VOCABULARY).replace("Paris\nparis", "paris\nParis")
    for change in (
        lambda folder: safetensors.torch.save_file(other, folder / "model.safetensors"),
        lambda folder: (folder / "vocab.txt").write_text(swapped),
        lambda folder: (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}'),
        lambda folder: write_settings(folder, SMALL | {"layer_norm_eps": 1e-5}),
        lambda folder: write_settings(folder, SMALL | {"hidden_act": "relu"}),
    ):
        seen.add(changed(change))
    seen |= {_fingerprint(small, load_format="dummy", seed=seed) for seed in (0, 1)}
    assert len(seen) == 9


def test_dummy_weights_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    folder = write_settings(tmp_path / "only-a-config", TINY_SETTINGS)

    def run(seed: int) -> np.ndarray:
        encoder = Encoder(_find(folder, load_format="dummy", seed=seed), device="cpu", dtype="float32")
        return _encode(encoder, TINY_SETTINGS, [Text(np.arange(9, dtype=np.int32))])[0, 3]

    assert np.array_equal(run(5), run(5))
    assert np.abs(run(5) - run(6)).max() > 0.1


def test_dummy_weights_take_the_folders_tokenizer_or_the_embedded_one(small: Path, tmp_path: Path) -> None:
    bare = write_settings(tmp_path / "only-a-config", TINY_SETTINGS)
    assert _find(bare, load_format="dummy").tokenizer_folder == _find("").folder
    found = _find(small, load_format="dummy")
    assert found.tokenizer_folder == small and found.weight_files == ()


def test_bfloat16_on_the_cpu_is_close(real_folder: Path, real_oracle: Oracle) -> None:
    texts = [
        "I love Paris",
        "The quick brown fox jumps over the lazy dog. " * 20,
        "",
        "Résumé, naïve café: 東京 and Москва are cities.",
        "paris " * 510,
    ]
    tokenizer = Tokenizer(real_folder)
    tokens = [one.text for one in tokenizer.encode(texts, labels=texts, max_length=512, truncation="error")]
    encoder = Encoder(_find(""), device="cpu", dtype="bfloat16")
    pool = Output(kind=OutputKind.POOLED_VECTORS, layers=(6,), row_size=384, pool=Pool(strategy=Strategy.MEAN))
    (rows,) = encoder.encode([Run(plan=Plan(outputs=(pool,), dtype="float32"), texts=tokens)])
    found = np.frombuffer(rows.data, np.float32).reshape(len(texts), 384)
    for text, vector in zip(texts, found, strict=True):
        wanted = real_oracle.text(text)[0][6].mean(0)
        assert vector @ wanted / np.linalg.norm(vector) / np.linalg.norm(wanted) >= 0.9999
    assert np.abs(found - np.stack([real_oracle.text(text)[0][6].mean(0) for text in texts])).max() > 1e-5


# --- what cannot be served ------------------------------------------------------------------------


def _line(error: str, *named: str) -> None:
    assert "\n" not in error.strip() and "Traceback" not in error, error
    for words in named:
        assert words in error, error


def _fails(capfd: pytest.CaptureFixture[str], argv: list[str], *named: str) -> None:
    """Checks that the server's command line ends with code 2 and one line."""
    assert cli.main([*NOWHERE, *argv]) == 2
    out, err = capfd.readouterr()
    assert not out and err.startswith("layertap-server: ")
    _line(err, *named)


def _settings(**change: Any) -> Callable[[Path], object]:
    return lambda folder: write_settings(folder, {k: v for k, v in (SMALL | change).items() if v is not None})


def _without(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


def _text(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def _tensors(change: Callable[[Weights], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        change(weights)
        safetensors.torch.save_file(weights, folder / "model.safetensors")

    return spoil


def _pickle(folder: Path) -> None:
    """Puts a pickle in the weights' place that would leave a trace if anybody opened it."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Trace(folder / "opened")))


class _Trace:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def _index(content: str) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(content)

    return spoil


QUERY = "encoder.layer.1.attention.self.query.weight"
REFUSED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no config": (_without("config.json"), ("config.json", "--model-id")),
    "a broken config": (_text("config.json", '{"model_type": "bert",'), ("config.json", "JSON")),
    "a config that is no text": (_text("config.json", b"\xff\xfe\x00"), ("config.json", "JSON")),
    "a config that is a list": (_text("config.json", "[]"), ("config.json", "model_type")),
    "a model_type that is a list": (_settings(model_type=["bert"]), ("config.json", "model_type", "serves bert")),
    **{
        kind: (_settings(model_type=kind), (kind, "serves bert, camembert, distilbert, electra, roberta, xlm-roberta"))
        for kind in ("deberta-v2", "mpnet", "modernbert", "albert", "xlm-roberta-xl")
    },
    "no model_type": (_settings(model_type=None), ("model_type", "bert")),
    "relative positions": (_settings(position_embedding_type="relative_key"), ("relative_key", "absolute")),
    "relative query positions": (_settings(position_embedding_type="relative_key_query"), ("relative_key_query",)),
    "no hidden_size": (_settings(hidden_size=None), ("hidden_size",)),
    "no max_position_embeddings": (_settings(max_position_embeddings=None), ("max_position_embeddings",)),
    "a hidden_size that is text": (_settings(hidden_size="24"), ("hidden_size",)),
    "heads that do not divide": (_settings(num_attention_heads=5), ("hidden_size", "24", "5")),
    "no heads": (_settings(num_attention_heads=0), ("num_attention_heads",)),
    "negative blocks": (_settings(num_hidden_layers=-1), ("num_hidden_layers",)),
    "an unknown activation": (_settings(hidden_act="swishy"), ("hidden_act", "swishy")),
    "an adapter beside the weights": (_text("adapter_config.json", "{}"), ("adapter_config.json", "merge_and_unload")),
    "only pickles": (_pickle, ("pickle", "safetensors")),
    "no weights": (_without("model.safetensors"), ("safetensors",)),
    "a missing tensor": (_tensors(lambda w: w.pop(QUERY)), (QUERY,)),
    "a missing block": (_settings(num_hidden_layers=3), ("encoder.layer.2",)),
    "half a pooler": (_tensors(lambda w: w.pop("pooler.dense.bias")), ("pooler.dense.bias",)),
    "a tensor of another shape": (_tensors(lambda w: w.update({QUERY: torch.ones(24, 25)})), (QUERY, "24, 25")),
    "another vocab_size": (_settings(vocab_size=61), ("word_embeddings", "61", "60")),
    "weights that are none": (_text("model.safetensors", "garbage" * 99), ("model.safetensors", "again")),
    "empty weights": (_text("model.safetensors", ""), ("model.safetensors", "again")),
    "weights that end early": (
        lambda folder: os.truncate(folder / "model.safetensors", 20_000),
        ("model.safetensors", "again"),
    ),
    "a missing shard": (_index('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'), ("00001-of-00002",)),
    "a shard without end": (
        _index(json.dumps({"weight_map": {"a": "x" * 5000 + ".safetensors"}})),
        ("cannot be read", "File name too long"),
    ),
    "a broken index": (_index('{"weight_map":'), ("index.json",)),
    "an index without a map": (_index("{}"), ("index.json",)),
    "an index that is a list": (_index("[]"), ("index.json",)),
    "no tokenizer": (_without("vocab.txt"), ("tokenizer.json", "vocab.txt")),
    "a broken tokenizer": (_text("tokenizer.json", '{"model":'), ("tokenizer",)),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("spoil", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_a_model_that_cannot_be_served(
    copy: Path, capfd: pytest.CaptureFixture[str], spoil: Callable[[Path], object], named: tuple[str, ...]
) -> None:
    spoil(copy)
    _fails(capfd, ["--model-id", str(copy), "--device", "cpu"], *named)
    assert not (copy / "opened").exists()


def test_a_pickle_beside_safetensors_is_not_opened(copy: Path, weights: Weights) -> None:
    _pickle(copy)
    safetensors.torch.save_file(weights, copy / "model.safetensors")
    _check(copy, SMALL, _oracle(SMALL, weights))
    assert not (copy / "opened").exists()


@pytest.mark.parametrize("folder", ["/nowhere/at/all", "./nowhere", "~/nowhere-at-all", "a/b/c"])
def test_a_folder_that_is_not_there(capfd: pytest.CaptureFixture[str], folder: str) -> None:
    _fails(capfd, ["--model-id", folder], "--model-id", "folder", "does not exist")


def test_a_folder_that_cannot_be_looked_into(capfd: pytest.CaptureFixture[str]) -> None:
    _fails(capfd, ["--model-id", "~/" + "long" * 100], "--model-id", "cannot be read", "File name too long")


def test_a_vocabulary_beyond_the_model_is_refused(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # Its texts would ask for rows that the model does not have.
    with (copy / "vocab.txt").open("a") as file:
        file.write("berlin\n")
    _fails(capfd, ["--model-id", str(copy), "--device", "cpu"], "vocab", "up to 60", "is 60")


def test_float16_needs_cuda(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["--model-id", str(small), "--device", "cpu", "--dtype", "float16"]
    _fails(capfd, argv, "--dtype", "float16", "cuda", "bfloat16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is cuda")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:0,cuda:1"])
def test_no_cuda(small: Path, capfd: pytest.CaptureFixture[str], device: str) -> None:
    _fails(capfd, ["--model-id", str(small), "--device", device], "--device", device, "no cuda", "--device cpu")


@pytest.mark.parametrize("device", ["gpu", "cpu:0", "", "cuda:99", "cpu,cpu"])
def test_a_device_that_is_none(small: Path, capfd: pytest.CaptureFixture[str], device: str) -> None:
    _fails(capfd, ["--model-id", str(small), "--device", device], "--device", "--device cpu")


@pytest.mark.parametrize("name", ["max-output-bytes", "max-call-output-bytes"])
def test_less_memory_than_one_longest_text_takes(small: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    longest = 3 * 64 * 24 * 4
    flags = [f"--{name}", str(longest - 1), "--max-call-output-bytes", str(longest - 1)]
    argv = ["--model-id", str(small), "--device", "cpu", *flags]
    _fails(capfd, argv, f"--{name}", str(longest), "raise")


def _run(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "layertap_server", *argv],
        capture_output=True,
        text=True,
        timeout=90,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )


def test_a_hub_name_without_network(tmp_path: Path) -> None:
    done = _run("--model-id", "bert-base-uncased", "--log-level", "error", HF_HOME=str(tmp_path))
    assert done.returncode == 2 and not done.stdout
    _line(done.stderr, "bert-base-uncased", "--model-id", "network")


def test_no_embedded_model(tmp_path: Path) -> None:
    """As after a plain pip install: the packages without the checkout around them."""
    root = Path(cli.__file__).parents[2]
    for package in ("client/layertap", "server/layertap_server"):
        shutil.copytree(root / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    path = os.pathsep.join(str(tmp_path / name) for name in ("client", "server"))
    done = _run("--port", "0", PYTHONPATH=path)
    assert done.returncode == 2 and not done.stdout
    _line(done.stderr, "make model", "--model-id bert-base-uncased")


# --- flags and variables --------------------------------------------------------------------------

BAD_VALUES: dict[str, tuple[str, ...]] = {
    "dtype": ("int8", "float64", ""),
    "load_format": ("pickle",),
    "log_level": ("loud",),
    "port": ("-1", "65536", "x", "1.5"),
    "instances": ("-1", "two"),
    "max_text_count": ("0", "-5", "many", "9000"),  # 9000 texts would never fit the queue.
    "max_request_bytes": ("1",),
    "max_frame_bytes": ("0",),
    "max_call_output_bytes": (str(1 << 40),),
    "grace_s": ("-1", "soon", "nan"),
    "stall_timeout_s": ("0", "nan"),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_VALUES.items() for value in values])
def test_bad_values_of_flags_and_variables(capfd: pytest.CaptureFixture[str], name: str, value: str) -> None:
    flag = "--" + name.replace("_", "-")
    try:
        code = cli.main([*NOWHERE, f"{flag}={value}"])
    except SystemExit as exc:
        code = exc.code
    out, err = capfd.readouterr()
    assert code == 2 and not out
    _line(err.strip().splitlines()[-1], flag)
    with pytest.raises(ConfigError) as caught:
        cli.parse([], {"LAYERTAP_" + name.upper(): value})
    message = str(caught.value)
    assert flag in message or "LAYERTAP_" + name.upper() in message
    _line(message)


def test_an_unknown_flag(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--max-texts", "5"])
    assert caught.value.code == 2
    _line(capfd.readouterr().err.strip().splitlines()[-1], "--max-texts")


def test_every_flag_is_a_variable_too() -> None:
    for field in dataclasses.fields(Config):
        last_choice = (field.metadata["choices"] or ("x",))[-1]
        value = last_choice if isinstance(field.default, str) else field.default + 1
        name = "LAYERTAP_" + field.name.upper()
        # What needs another beside it finds it there.
        beside = {"LAYERTAP_INSECURE_LISTEN": "true", "LAYERTAP_TLS_CERT": "y", "LAYERTAP_TLS_KEY": "y"}
        assert getattr(cli.parse([], beside | {name: str(value)}), field.name) == value
        assert getattr(cli.parse(["--" + field.name.replace("_", "-"), str(value)], beside), field.name) == value
    assert cli.parse(["--port", "1"], {"LAYERTAP_PORT": "2"}).port == 1
    assert cli.parse([], {"LAYERTAP_PORT": "2", "LAYERTAP_SOMETHING": "x"}).port == 2
    assert cli.parse([], {}) == Config()


def test_a_variable_reaches_the_server(small: Path) -> None:
    variables = {"LAYERTAP_DEVICE": "cpu", "LAYERTAP_DTYPE": "float16", "LAYERTAP_LOG_LEVEL": "error"}
    with pytest.raises(ServerError, match="--dtype is float16, which needs cuda"):
        Server("--model-id", str(small), environment=variables)


def test_help_tells_all_of_every_knob(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert not caught.value.code
    # argparse breaks lines where it likes.
    told = "".join(capfd.readouterr().out.split())
    for field in dataclasses.fields(Config):
        default = "empty" if field.default == "" else field.default
        assert "--" + field.name.replace("_", "-") in told
        assert len(field.metadata["reason"]) > 10 and "".join(field.metadata["reason"].split()) in told
        unit = "," + field.metadata["unit"] if field.metadata["unit"] else ""
        assert f"[{type(field.default).__name__}{unit};default:{default}]" in told
        for choice in field.metadata["choices"]:
            assert choice in told
    assert "LAYERTAP_" in told
