"""Model folders held against transformers: what is served has its tokens; all else is refused in one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import transformers
from transformers.activations import ACT2FN

from layertap.errors import InvalidArgumentError
from layertap_server.model import sentence_config
from layertap_server.model.checkpoint import Checkpoint, CheckpointError, find
from layertap_server.model.settings import _LEARNED, ModelSettings, read_settings
from layertap_server.model.tokenizer import Tokenizer
from layertap_server.model.tokenizer_engine import Tokenizing
from layertap_server.model.weights import expected_shapes
from layertap_server.types import Pool, Strategy

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "##s", "[", "]", "sep"]
SETTINGS = {
    "model_type": "bert",
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
}
TEXTS = ["a b", "a [SEP] b", "[MASK] as z", "", ("a b", "c"), ("", ""), ["a", "z", "bs"]]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def write(folder: Path, name: str, content: Any) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "small-bert"
    write(made, "config.json", SETTINGS)
    write(made, "vocab.txt", "\n".join(WORDS) + "\n")
    write(made, "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"})
    save(made, weights())
    return made


def weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = expected_shapes(ModelSettings.of(SETTINGS), pooler=True)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def save(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def found(folder: Path, load_format: str = "safetensors") -> Checkpoint:
    return find(model_id=str(folder), revision="", name="", load_format=load_format, seed=0)


def facts(folder: Path) -> Any:
    checkpoint = found(folder)
    tokenizer = Tokenizer(checkpoint.tokenizer_folder)
    tokenizer.check_fits(checkpoint)
    return tokenizer.model_facts(checkpoint, fingerprint="f", has_pooler=True)


# What transformers keeps outside tokenizer.json.

CONFIGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "special tokens are split": {"split_special_tokens": True},
    "no token types": {"model_input_names": ["input_ids", "attention_mask"]},
    "cased": {"do_lower_case": False},
    "padding and truncation at the left": {"padding_side": "left", "truncation_side": "left"},
    "a length": {"model_max_length": 6},
    "accents": {"strip_accents": True},
}


@pytest.mark.parametrize("as_json", [False, True], ids=["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_tokens_are_those_of_auto_tokenizer(folder: Path, config: dict[str, Any], as_json: bool) -> None:
    if as_json:
        transformers.AutoTokenizer.from_pretrained(str(folder)).save_pretrained(folder)
    write(folder, "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"} | config)
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    ours = Tokenizer(folder)
    for lower_case in (False, True):
        results = ours.encode(
            TEXTS,
            [str(n) for n in range(len(TEXTS))],
            Tokenizing(max_length=99, truncation="error", lower_case=lower_case),
        )
        for item, one in zip(TEXTS, results, strict=True):
            if lower_case and not config.get("do_lower_case", True):
                continue
            parts = [[part] for part in item] if isinstance(item, tuple) else [[item]]
            wanted = theirs(*parts, is_split_into_words=isinstance(item, list), return_special_tokens_mask=True)
            assert one.text.input_ids.tolist() == wanted["input_ids"][0]
            types = [0] * one.text.token_count if one.text.token_type_ids is None else one.text.token_type_ids.tolist()
            assert types == wanted.get("token_type_ids", [[0] * one.text.token_count])[0]
            marked = ours.mark_special_tokens(one).text.special_tokens_mask
            assert marked.tolist() == wanted["special_tokens_mask"][0]
    assert facts(folder).default_max_length == min(theirs.model_max_length, 32)
    assert facts(folder).max_length == 32


def test_the_fingerprint_covers_what_lies_outside_tokenizer_json(folder: Path) -> None:
    seen = set()
    for config in CONFIGS.values():
        write(folder, "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"} | config)
        checkpoint = found(folder)
        tokenizer = Tokenizer(folder)
        sentences = tokenizer.sentence_config(checkpoint).description
        seen.add(checkpoint.fingerprint(tokenizer=tokenizer.description, sentences=sentences, dtype="float32"))
    assert len(seen) == len(CONFIGS)


def test_an_unknown_word_is_pooled_and_what_the_tokenizer_adds_is_not(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    pool = Pool(strategy=Strategy.MEAN, exclude_special_tokens=True)
    unknown, written = tokenizer.encode(["z", "a [SEP]"], ["0", "1"], Tokenizing(max_length=9, truncation="error"))
    assert pool.positions(tokenizer.mark_special_tokens(unknown).text).tolist() == [1]
    assert pool.positions(tokenizer.mark_special_tokens(written).text).tolist() == [1, 2]
    assert tokenizer.special_token_ids == (0, 2, 3)


def test_a_text_that_the_tokenizer_fails_on_harms_no_other(folder: Path) -> None:
    vocabulary = {word: n for n, word in enumerate(WORDS) if word != "[UNK]"}
    transformers.AutoTokenizer.from_pretrained(str(folder)).save_pretrained(folder)
    described = json.loads((folder / "tokenizer.json").read_text())
    described["model"]["vocab"] = vocabulary
    described["added_tokens"] = [one for one in described["added_tokens"] if one["content"] != "[UNK]"]
    write(folder, "tokenizer.json", described)
    (folder / "vocab.txt").unlink()
    write(folder, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    good, bad = Tokenizer(folder).encode(["a b", "z"], ["x", "y"], Tokenizing(max_length=9, truncation="error"))
    assert good.text.token_count == 4
    assert type(bad) is InvalidArgumentError and "y" in bad.details and "unknown token" in bad.details


# Configurations.


def test_what_config_json_leaves_out_has_the_defaults_of_transformers(tmp_path: Path) -> None:
    write(tmp_path, "config.json", {"model_type": "bert"})
    settings, theirs = read_settings(tmp_path), transformers.BertConfig()
    assert len(settings) > 8
    assert all(value == getattr(theirs, key) for key, value in settings.items())


def test_all_activations_with_weights_are_known() -> None:
    learned = []
    for name in ACT2FN:
        try:
            parameters = list(ACT2FN[name].parameters())
        except (ImportError, AttributeError):  # A function, or one that needs a package.
            continue
        learned += [name] if parameters else []
    assert set(learned) <= set(_LEARNED)


def change(**settings: Any) -> Callable[[Path], object]:
    return lambda folder: write(folder, "config.json", SETTINGS | settings)


def file(name: str, content: Any) -> Callable[[Path], object]:
    return lambda folder: write(folder, name, content)


def tensors(**changed: np.ndarray) -> Callable[[Path], object]:
    return lambda folder: save(folder, weights() | {name.replace("__", "."): one for name, one in changed.items()})


def instead_of_weights(folder: Path, index: Any) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    write(folder, "model.safetensors.index.json", index)


def as_pipe(name: str) -> Callable[[Path], object]:
    return lambda folder: ((folder / name).unlink(missing_ok=True), os.mkfifo(folder / name))


def as_folder(name: str) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return spoil


REFUSED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "a decoder": (change(is_decoder=True), ("is_decoder", "encoder")),
    "cross attention": (change(add_cross_attention=True), ("add_cross_attention",)),
    "chunks": (change(chunk_size_feed_forward=7), ("chunk_size_feed_forward", "7")),
    "relative positions": (change(position_embedding_type="relative_key"), ("relative_key",)),
    "pruned heads": (change(pruned_heads={"0": [1]}), ("pruned_heads",)),
    "quantized": (change(quantization_config={"bits": 4}), ("quantization_config",)),
    "learned activation": (change(hidden_act="prelu"), ("prelu", "weights")),
    "an activation that is a list": (change(hidden_act=["gelu"]), ("hidden_act",)),
    "no token types": (change(type_vocab_size=0), ("type_vocab_size 0",)),
    "what transformers refuses": (change(hidden_dropout_prob="high"), ("hidden_dropout_prob", "transformers")),
    "no vocab_size": (
        lambda folder: write(folder, "config.json", {k: v for k, v in SETTINGS.items() if k != "vocab_size"}),
        ("vocab_size", "30522", "default"),
    ),
    "absurd blocks": (change(num_hidden_layers=10**9), ("num_hidden_layers", "1024")),
    "absurd sizes": (change(intermediate_size=10**15), ("intermediate_size", "GB")),
    **{
        f"a pipe for {name}": (as_pipe(name), (name, "not a regular file"))
        for name in ("config.json", "vocab.txt", "special_tokens_map.json")
    },
    **{
        f"more {name} than any number": (change(**{name: 10**4000}), (name, "whole number"))
        for name in ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings", "intermediate_size")
    },
    "a config that is a folder": (as_folder("config.json"), ("config.json", "directory")),
    "nested JSON": (file("config.json", "[" * 200_000), ("config.json", "JSON")),
    "a nested index": (lambda folder: instead_of_weights(folder, "[" * 200_000), ("index.json", "JSON")),
    "an index that leaves the folder": (
        lambda folder: instead_of_weights(folder, {"weight_map": {"a": "../outside.safetensors"}}),
        ("index.json", "outside"),
    ),
    "an index with an absolute path": (
        lambda folder: instead_of_weights(folder, {"weight_map": {"a": "/outside.safetensors"}}),
        ("index.json", "outside"),
    ),
    "an index of numbers": (lambda folder: instead_of_weights(folder, {"weight_map": {"a": 3}}), ("weight_map",)),
    "integer weights": (
        tensors(encoder__layer__1__output__dense__bias=np.zeros(8, np.int8)),
        ("encoder.layer.1.output.dense.bias", "I8"),
    ),
    "an unread tensor": (
        tensors(encoder__layer__0__intermediate__intermediate_act_fn__weight=np.ones(1, np.float32)),
        ("encoder.layer.0.intermediate.intermediate_act_fn.weight",),
    ),
    "more blocks than the config says": (change(num_hidden_layers=1), ("encoder.layer.1.", "more")),
    "a tensor with and without the prefix": (
        tensors(**{"bert__pooler__dense__bias": np.ones(8, np.float32)}),
        ("pooler.dense.bias", "twice"),
    ),
    "a pointer for the config": (file("config.json", POINTER), ("config.json", "git lfs pull")),
    "a pointer for the weights": (file("model.safetensors", POINTER), ("model.safetensors", "git lfs pull")),
    "a pointer for the vocabulary": (file("vocab.txt", POINTER), ("vocab.txt", "git lfs pull")),
    "a vocabulary with repeated lines": (
        file("vocab.txt", "\n".join([*WORDS, *["a"] * 10, "end"]) + "\n"),
        ("ids up to 22", "vocab_size is 20", "repeat"),
    ),
    "a length that is none": (file("tokenizer_config.json", {"model_max_length": -3}), ("model_max_length", "-3")),
    "a nested tokenizer": (file("tokenizer.json", "[" * 200_000), ("tokenizer",)),
    "a tokenizer in Python": (
        file("tokenizer_config.json", {"tokenizer_class": "BertJapaneseTokenizer"}),
        ("BertJapaneseTokenizer", "tokenizer.json"),
    ),
}


@pytest.mark.parametrize(("spoil", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_a_folder_that_is_refused(folder: Path, spoil: Callable[[Path], object], named: tuple[str, ...]) -> None:
    facts(folder)
    spoil(folder)
    with pytest.raises(CheckpointError) as caught:
        facts(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    for words in named:
        assert words in message, message


@pytest.mark.parametrize("settings", [{"num_hidden_layers": 10**9}, {"hidden_size": 10**8}, {"vocab_size": 10**15}])
def test_dummy_weights_of_absurd_sizes_are_refused(folder: Path, settings: dict[str, Any]) -> None:
    write(folder, "config.json", SETTINGS | settings)
    with pytest.raises(CheckpointError, match=next(iter(settings))):
        found(folder, "dummy")


def test_heads_and_buffers_are_not_read(folder: Path) -> None:
    plain = {f"bert.{name}": one for name, one in weights().items()}
    heads = {
        "cls.predictions.bias": np.zeros(20, np.float32),
        "classifier.weight": np.zeros((2, 8), np.float32),
        "bert.embeddings.position_ids": np.arange(32)[None],
    }
    save(folder, plain | heads)
    assert facts(folder).layer_count == 2


# Layouts of sentence-transformers.

SENTENCE_NAMES = [
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]


@pytest.mark.parametrize("place", ["", "0_Transformer"])
@pytest.mark.parametrize("name", SENTENCE_NAMES)
def test_every_name_of_the_transformer_module(folder: Path, name: str, place: str) -> None:
    if place:
        inside = folder / place
        inside.mkdir()
        for path in [path for path in folder.iterdir() if path.is_file()]:
            shutil.move(path, inside / path.name)
    kinds = "sentence_transformers.models."
    write(
        folder,
        "modules.json",
        [{"path": place, "type": kinds + "Transformer"}, {"path": "1_Pooling", "type": kinds + "Pooling"}],
    )
    write(folder / "1_Pooling", "config.json", {"pooling_mode_cls_token": True})
    write(folder / place, name, {"max_seq_length": 7, "do_lower_case": True})
    checkpoint = found(folder)
    assert checkpoint.name == "small-bert" and checkpoint.weights_folder == folder / place
    config = Tokenizer(checkpoint.tokenizer_folder).sentence_config(checkpoint)
    assert (config.max_length, config.lower_case, config.unsupported) == (7, True, "")
    assert config.strategies == (Strategy.CLS,)


def test_a_sentence_configuration_that_cannot_be_read_is_told(folder: Path) -> None:
    write(folder, "modules.json", "[" * 200_000)
    checkpoint = found(folder)
    config = sentence_config.read(
        checkpoint.folder, hidden_size=8, max_length=32, position_count=32, truncation="right"
    )
    assert "modules.json" in config.unsupported
