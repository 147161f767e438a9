"""Servers whose tokenizers are not BERT's own: a text that does not fit the model is refused alone, in every RPC."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from sentence_transformers import SentenceTransformer
from support import BOUND, open_client, running, worst
from tokenizers import models, normalizers, pre_tokenizers, processors

from layertap import FailedPreconditionError, InvalidArgumentError, Pooling
from layertap.cli import main

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "word"]
SETTINGS = {
    "vocab_size": 12,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}
LONG = "word " * 9


def save(folder: Path, post_processor: Any = None, **config: Any) -> Path:
    """Writes a random model with a tokenizer of whole words."""
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**SETTINGS, initializer_range=0.3)).save_pretrained(folder)
    vocabulary = {word: n for n, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if post_processor:
        tokenizer.post_processor = post_processor
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    described = {"tokenizer_class": "PreTrainedTokenizerFast", **named, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair takes four special tokens, and no token types; texts have a length below the model's."""
    template = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    config = {"model_max_length": 16, "model_input_names": ["input_ids", "attention_mask"]}
    return save(tmp_path_factory.mktemp("models") / "four", template, **config)


@pytest.fixture(scope="module")
def none(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer adds nothing."""
    return save(tmp_path_factory.mktemp("models") / "none", padding_side="left")


@pytest.fixture(scope="module")
def addresses(four: Path, none: Path) -> Iterator[dict[Path, str]]:
    with (
        running("--device", "cpu", "--model-id", str(four)) as one,
        running("--device", "cpu", "--model-id", str(none)) as other,
    ):
        yield {four: one.address, none: other.address}


@pytest.fixture
def with_four(kind: str, addresses: dict[Path, str], four: Path) -> Iterator[Any]:
    client = open_client(kind, addresses[four])
    yield client
    client.close()


@pytest.fixture
def with_none(kind: str, addresses: dict[Path, str], none: Path) -> Iterator[Any]:
    client = open_client(kind, addresses[none])
    yield client
    client.close()


@pytest.mark.parametrize("output", [{}, {"pooling": "mean"}], ids=["layers", "unary"])
def test_a_pair_that_has_no_room_for_its_special_tokens_is_refused_alone(
    with_four: Any, output: dict[str, Any]
) -> None:
    texts: list[Any] = [(LONG, LONG), "innocent"]
    with pytest.raises(InvalidArgumentError, match=r"inputs\[0\] needs 4 special tokens, max_length is 3"):
        with_four.embed(texts, truncation="right", max_length=3, **output)
    bad, good = with_four.embed_stream(texts, truncation="right", max_length=3, **output)
    assert good.error is None and type(bad.error) is InvalidArgumentError
    assert with_four.embed([(LONG, LONG)], truncation="right", max_length=4).token_counts.tolist() == [4]


def test_pairs_have_the_numbers_of_transformers_without_token_types(with_four: Any, four: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(four))
    encoded = tokenizer("a b", "c", return_tensors="pt")
    assert "token_type_ids" not in encoded
    model = transformers.BertModel.from_pretrained(str(four), attn_implementation="eager").eval()
    with torch.inference_mode():
        wanted = model(**encoded, output_hidden_states=True).hidden_states
    found = with_four.embed([("a b", "c")], layers="all")
    for layer, rows in enumerate(wanted):
        assert worst(found.ragged(layer)[0], rows[0].numpy()) <= BOUND
    assert not with_four.tokenize([("a b", "c")]).token_type_ids.any()


def test_the_length_of_the_tokenizer_is_the_default_and_the_models_the_limit(with_four: Any) -> None:
    info = with_four.model_info()
    assert (info.default_max_length, info.max_length) == (16, 32)
    with pytest.raises(InvalidArgumentError, match="has 20 tokens, max_length is 16"):
        with_four.embed("word " * 18)
    assert with_four.embed("word " * 18, truncation="right").token_counts.tolist() == [16]
    assert with_four.embed("word " * 18, max_length=32).token_counts.tolist() == [20]


@pytest.mark.parametrize("empty", ["", ("", ""), [""]], ids=["text", "pair", "words"])
def test_a_text_without_tokens_is_refused_alone(with_none: Any, empty: Any) -> None:
    texts = ["a b", empty, "c"]
    for output in ({}, {"pooling": "mean"}, {"layers": "all"}):
        with pytest.raises(InvalidArgumentError, match=r"inputs\[1\] has no tokens"):
            with_none.embed(texts, **output)
        first, bad, last = with_none.embed_stream(texts, **output)
        assert first.error is None and last.error is None
        assert type(bad.error) is InvalidArgumentError and "no tokens" in bad.error.details
    assert with_none.tokenize(texts).token_counts.tolist() == [2, 0, 1]


@pytest.mark.parametrize("output", [("--pooling", "mean"), ("--layers", "0,-1")], ids=["pooled", "layers"])
def test_a_text_without_tokens_is_one_bad_item_of_a_file(
    addresses: dict[Path, str], none: Path, output: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.txt").write_text("a b\n\nc\n")
    flags = ["--target", addresses[none], "-o", str(tmp_path / "out.npz"), *output]
    assert main(["embed", str(tmp_path / "in.txt"), *flags]) == 3
    with np.load(tmp_path / "out.npz") as found:
        assert found["ids"].tolist() == [1, 3] and found["token_counts"].tolist() == [2, 1]
    assert "no tokens" in capsys.readouterr().err
    (bad,) = (tmp_path / "out.npz.errors.jsonl").read_text().splitlines()
    assert "no tokens" in bad


def test_the_model_info_tells_what_the_tokenizer_does(with_four: Any, with_none: Any, tiny: Any) -> None:
    found, other = with_four.model_info(), tiny.model_info()
    assert with_none.model_info().padding_side == "left"
    named = {"unk_token": 1, "pad_token": 0, "cls_token": 2, "sep_token": 3}
    assert (found.special_tokens, found.padding_side, found.has_token_type_ids) == (named, "right", False)
    assert (other.special_tokens["mask_token"], other.padding_side, other.has_token_type_ids) == (103, "right", True)
    assert (found.pad_token_id, other.pad_token_id) == (0, 0)


def test_a_client_takes_tokens_and_strings_of_its_one_model_alone(
    kind: str, addresses: dict[Path, str], none: Path
) -> None:
    client = open_client(kind, addresses[none], fingerprint="f" * 64)
    for ask in (lambda: client.tokenize("a"), lambda: client.decode([5])):
        with pytest.raises(FailedPreconditionError, match="another model answers"):
            ask()
    client.close()


def test_encode_names_a_text_without_tokens(with_none: Any) -> None:
    assert with_none.encode(["a", "b"]).shape == (2, 8)
    with pytest.raises(InvalidArgumentError, match="no tokens"):
        with_none.encode(["a", "", "b"])


def test_an_unknown_word_is_pooled_without_special_tokens(with_four: Any) -> None:
    found = with_four.embed("🦾", pooling=Pooling("mean", include_special_tokens=False))
    rows = with_four.embed("🦾").ragged(-1)[0]
    assert np.abs(found.pooled[0] - rows[1]).max() <= BOUND
    assert with_four.model_info().special_token_ids == (0, 2, 3)


def test_a_transformer_in_a_folder_of_its_own_encodes_as_sentence_transformers(four: Path, tmp_path: Path) -> None:
    root = tmp_path / "sentences"
    (root / "0_Transformer").mkdir(parents=True)
    (root / "1_Pooling").mkdir()
    for path in four.iterdir():
        (root / "0_Transformer" / path.name).write_bytes(path.read_bytes())
    kinds = "sentence_transformers.models."
    modules = [
        {"idx": 0, "name": "0", "path": "0_Transformer", "type": kinds + "Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": kinds + "Pooling"},
    ]
    (root / "modules.json").write_text(json.dumps(modules))
    (root / "0_Transformer" / "sentence_roberta_config.json").write_text(json.dumps({"max_seq_length": 8}))
    pooling = {"word_embedding_dimension": 8, "pooling_mode_max_tokens": True}
    (root / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    texts = ["a b c", "", LONG, "🦾"]
    wanted = SentenceTransformer(str(root), device="cpu").encode(texts)
    with running("--device", "cpu", "--model-id", str(root)) as server:
        client = open_client("sync", server.address)
        found = client.encode(texts)
        client.close()
    assert np.abs(found - wanted).max() <= BOUND
