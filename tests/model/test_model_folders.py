"""Every kind of BERT checkpoint against the oracle.

A socket adds nothing to most of this: checkpoints are found and run in this process, as `app` does it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from support import BOUND, TINY_SETTINGS, open_client, running, worst, write_settings
from support.checkpoints import SMALL, VOCABULARY, Weights, check, encode, find_in, oracle_of, save
from support.oracle import Oracle

from layertap.errors import FailedPreconditionError, InvalidArgumentError
from layertap_server.engine.encoder import Encoder
from layertap_server.engine.weight_reader import dummy_weights
from layertap_server.model.checkpoint import EMBEDDED_MODEL_NAME
from layertap_server.model.settings import ModelSettings
from layertap_server.model.tokenizer import Tokenizer
from layertap_server.model.tokenizer_engine import Tokenizing
from layertap_server.types import Output, OutputKind, Plan, Pool, Run, Strategy, Text

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
    save(tmp_path, settings)
    check(tmp_path, settings, oracle_of(settings, safetensors.torch.load_file(tmp_path / "model.safetensors")))


def test_settings_that_are_left_out_have_transformers_defaults(tmp_path: Path) -> None:
    left_out = ("hidden_act", "type_vocab_size", "layer_norm_eps", "pad_token_id")
    settings = {name: value for name, value in SMALL.items() if name not in left_out}
    save(tmp_path, settings, dummy_weights(ModelSettings.of(SMALL | {"initializer_range": 0.3}), 1))
    oracle = oracle_of(settings, safetensors.torch.load_file(tmp_path / "model.safetensors"))
    check(tmp_path, SMALL, oracle)


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
    save(tmp_path, SMALL, naming(weights))
    check(tmp_path, SMALL, oracle_of(SMALL, weights))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_stored_in_other_formats(tmp_path: Path, weights: Weights, dtype: torch.dtype) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in weights.items()}
    save(tmp_path, SMALL, stored)
    check(tmp_path, SMALL, oracle_of(SMALL, {name: tensor.float() for name, tensor in stored.items()}))


def test_sharded_weights(copy: Path, weights: Weights) -> None:
    (copy / "model.safetensors").unlink()
    oracle_of(SMALL, weights).save_pretrained(copy, max_shard_size="20KB")
    assert len(list(copy.glob("model-*.safetensors"))) > 2
    assert (copy / "model.safetensors.index.json").is_file() and not (copy / "model.safetensors").exists()
    check(copy, SMALL, oracle_of(SMALL, weights))


def test_no_pooler_weights(copy: Path, weights: Weights) -> None:
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    safetensors.torch.save_file(kept, copy / "model.safetensors")
    check(copy, SMALL, oracle_of(SMALL, kept), pooler=False)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything unusual at once: cased, vocab.txt only, one token type, odd sizes, no pooler."""
    settings = SMALL | {"type_vocab_size": 1, "hidden_size": 15, "intermediate_size": 37, "hidden_act": "gelu_new"}
    weights = dummy_weights(ModelSettings.of(settings | {"initializer_range": 0.3}), 1)
    kept = {f"bert.{name}": tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    folder = save(tmp_path_factory.mktemp("secret-place") / "odd-bert", settings, kept)
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
    assert info.fingerprint == fingerprint(odd)
    assert odd_client.embed("Paris").model.fingerprint == info.fingerprint


# --- tokenizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cased", [True, False], ids=["cased", "uncased"])
def test_a_tokenizer_from_vocab_txt_alone(copy: Path, cased: bool) -> None:
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": not cased}
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    texts = ["I love Paris", "paris És É e", "[MASK] x", "", "PARIS"]
    theirs = transformers.AutoTokenizer.from_pretrained(str(copy))
    ours = Tokenizer(copy).encode(texts, texts, Tokenizing(max_length=64, truncation="error"))
    assert [one.text.input_ids.tolist() for one in ours] == theirs(texts)["input_ids"]
    pieces = ours[0].encoding.tokens
    assert pieces == (["[CLS]", "I", "love", "Paris", "[SEP]"] if cased else ["[CLS]", "i", "love", "paris", "[SEP]"])


def test_a_tokenizer_from_vocab_txt_with_no_configuration_at_all(copy: Path) -> None:
    assert not (copy / "tokenizer_config.json").exists()
    theirs = transformers.AutoTokenizer.from_pretrained(str(copy))
    (ours,) = Tokenizer(copy).encode(["I love Paris"], ["x"], Tokenizing(max_length=64, truncation="error"))
    assert ours.text.input_ids.tolist() == theirs("I love Paris")["input_ids"]
    assert ours.text.token_count == 5


def test_a_tokenizer_from_tokenizer_json_alone(copy: Path, tmp_path: Path) -> None:
    transformers.AutoTokenizer.from_pretrained(str(copy)).save_pretrained(tmp_path / "saved")
    (copy / "vocab.txt").unlink()
    shutil.copy(tmp_path / "saved" / "tokenizer.json", copy)
    theirs = transformers.AutoTokenizer.from_pretrained(str(copy))
    (ours,) = Tokenizer(find_in(copy).tokenizer_folder).encode(
        ["i love paris é"], ["x"], Tokenizing(max_length=64, truncation="error")
    )
    assert ours.text.input_ids.tolist() == theirs("i love paris é")["input_ids"]


# --- names, fingerprints, dummies -----------------------------------------------------------------


def test_a_model_is_never_called_by_its_path(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_in(small).name == find_in(f"{small}/").name == "small-bert"
    assert find_in(small, name="mine").name == "mine"
    monkeypatch.chdir(small)
    assert find_in(".").name == find_in("./").name == find_in("../small-bert").name == "small-bert"
    monkeypatch.chdir(small.parent)
    assert find_in("small-bert").name == "small-bert"
    assert find_in("").name == EMBEDDED_MODEL_NAME and "/" not in EMBEDDED_MODEL_NAME


def fingerprint(folder: Path, dtype: str = "float32", **options: Any) -> str:
    found = find_in(folder, **options)
    tokenizer = Tokenizer(found.tokenizer_folder)
    config = tokenizer.sentence_config(found)
    return found.fingerprint(tokenizer=tokenizer.description, sentences=config.description, dtype=dtype)


def test_the_fingerprint_tells_models_apart(small: Path, tmp_path: Path, weights: Weights) -> None:
    whole = fingerprint(small)
    assert len(whole) == 64 and set(whole) <= set("0123456789abcdef")
    seen = {whole, fingerprint(small, "bfloat16")}

    def changed(change: Callable[[Path], object]) -> str:
        folder = Path(shutil.copytree(small, tmp_path / f"copy-{len(seen)}"))
        assert fingerprint(folder) == whole  # Another folder with another name, and the same model.
        change(folder)
        return fingerprint(folder)

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
    seen |= {fingerprint(small, load_format="dummy", seed=seed) for seed in (0, 1)}
    assert len(seen) == 9


def test_dummy_weights_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    folder = write_settings(tmp_path / "only-a-config", TINY_SETTINGS)

    def run(seed: int) -> np.ndarray:
        encoder = Encoder(find_in(folder, load_format="dummy", seed=seed), device="cpu", dtype="float32")
        return encode(encoder, TINY_SETTINGS, [Text(np.arange(9, dtype=np.int32))])[0, 3]

    assert np.array_equal(run(5), run(5))
    assert np.abs(run(5) - run(6)).max() > 0.1


def test_dummy_weights_take_the_folders_tokenizer_or_the_embedded_one(small: Path, tmp_path: Path) -> None:
    bare = write_settings(tmp_path / "only-a-config", TINY_SETTINGS)
    assert find_in(bare, load_format="dummy").tokenizer_folder == find_in("").folder
    found = find_in(small, load_format="dummy")
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
    tokens = [one.text for one in tokenizer.encode(texts, texts, Tokenizing(max_length=512, truncation="error"))]
    encoder = Encoder(find_in(""), device="cpu", dtype="bfloat16")
    pool = Output(kind=OutputKind.POOLED_VECTORS, layers=(6,), row_size=384, pool=Pool(strategy=Strategy.MEAN))
    (rows,) = encoder.encode([Run(plan=Plan(outputs=(pool,), dtype="float32"), texts=tokens)])
    found = np.frombuffer(rows.data, np.float32).reshape(len(texts), 384)
    for text, vector in zip(texts, found, strict=True):
        wanted = real_oracle.text(text)[0][6].mean(0)
        assert vector @ wanted / np.linalg.norm(vector) / np.linalg.norm(wanted) >= 0.9999
    assert np.abs(found - np.stack([real_oracle.text(text)[0][6].mean(0) for text in texts])).max() > 1e-5
