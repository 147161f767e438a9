"""Folders of each model type: what config.json leaves out, weights with heads, files of tokenizers, refusals."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
import torch
import transformers
from support import BOUND, family, worst
from support.oracle import Oracle

from layertap_server.engine.encoder import Encoder
from layertap_server.model.checkpoint import Checkpoint, CheckpointError, find
from layertap_server.model.tokenizer import Tokenizer
from layertap_server.model.tokenizer_engine import Tokenizing
from layertap_server.types import Output, OutputKind, Plan, Run, Text

KINDS = [kind for kind in family.TOKENIZERS if kind != "bert"]
kinds = pytest.mark.parametrize("kind", KINDS)


def found(folder: Path, load_format: str = "safetensors") -> Checkpoint:
    return find(model_id=str(folder), revision="", name="", load_format=load_format, seed=3)


def check(folder: Path, oracle: Oracle, load_format: str = "safetensors", *, pooler: bool = False) -> None:
    """Runs every layer of texts with padding inside, up to the longest, against the oracle."""
    encoder = Encoder(found(folder, load_format), device="cpu", dtype="float32")
    assert encoder.has_pooler is pooler
    config, random = oracle.model.config, np.random.default_rng(0)
    last, size = config.num_hidden_layers, config.hidden_size
    length = found(folder, load_format).settings.position_count
    texts = [Text(random.integers(0, config.vocab_size, count).astype(np.int32)) for count in (1, 7, 7, length)]
    texts.append(Text(np.array([5, config.pad_token_id, 6], np.int32)))
    outputs = [Output(kind=OutputKind.HIDDEN_STATES, layers=tuple(range(last + 1)), row_size=size)]
    if pooler:
        outputs.append(Output(kind=OutputKind.POOLER_OUTPUT, layers=(last,), row_size=size))
    made = {
        (rows.output_index, rows.layer): np.frombuffer(rows.data, np.float32).reshape(-1, size)
        for rows in encoder.encode([Run(plan=Plan(outputs=tuple(outputs), dtype="float32"), texts=texts)])
    }
    end = 0
    for n, text in enumerate(texts):
        layers, pooler_output = oracle.run(text.input_ids.tolist())
        for layer, rows in enumerate(layers):
            assert worst(made[0, layer][end : end + text.token_count], rows) <= BOUND, (n, layer)
        if pooler:
            assert worst(made[1, last][n], pooler_output) <= BOUND
        end += text.token_count


def change(folder: Path, **settings: Any) -> None:
    """Changes config.json; None: takes the key out."""
    path = folder / "config.json"
    kept = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: value for key, value in kept.items() if value is not None}))


# Settings.


@kinds
def test_settings_that_are_left_out_have_transformers_defaults_for_the_type(kind: str, tmp_path: Path) -> None:
    folder = family.save(kind, tmp_path)
    written = json.loads((folder / "config.json").read_text())
    needed = {"model_type", "vocab_size", "max_position_embeddings", "embedding_size"}
    needed |= {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"}
    needed |= {"dim", "n_layers", "n_heads", "hidden_dim"}
    change(folder, **dict.fromkeys(set(written) - needed))
    check(folder, Oracle.load(folder), pooler=kind not in family.WITHOUT_POOLER)


def test_settings_that_a_type_does_not_read_change_nothing(tmp_path: Path) -> None:
    folder = family.save("distilbert", tmp_path)
    change(folder, layer_norm_eps=0.5, hidden_act="relu", type_vocab_size=9, intermediate_size=5, embedding_size=7)
    check(folder, Oracle.load(folder))


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_positions_count_from_the_padding_of_the_configuration(tmp_path: Path, padding: int) -> None:
    folder = family.save("roberta", tmp_path, pad_token_id=padding)
    assert found(folder).settings.position_count == 66 - padding - 1
    check(folder, Oracle.load(folder), pooler=True)


@pytest.mark.parametrize("size", [8, 32, 40])
def test_embeddings_of_any_size_are_projected(tmp_path: Path, size: int) -> None:
    folder = family.save("electra", tmp_path, embedding_size=size)
    check(folder, Oracle.load(folder))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in family.WITHOUT_POOLER])
def test_a_model_saved_without_its_pooler(kind: str, tmp_path: Path) -> None:
    folder = family.save(kind, tmp_path, pooler=False)
    check(folder, Oracle.load(folder), pooler=False)


@pytest.mark.parametrize(
    ("kind", "settings"), [("distilbert", {"activation": "relu"}), ("roberta", {"hidden_act": "gelu_new"})]
)
def test_other_activations(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    folder = family.save(kind, tmp_path, **settings)
    check(folder, Oracle.load(folder), pooler=kind == "roberta")


@kinds
def test_dummy_weights_are_those_of_the_type(kind: str, tmp_path: Path) -> None:
    folder = family.save(kind, tmp_path)
    (folder / "model.safetensors").unlink()
    checkpoint = found(folder, "dummy")
    encoder = Encoder(checkpoint, device="cpu", dtype="float32")
    assert encoder.has_pooler is (kind not in family.WITHOUT_POOLER)
    output = Output(kind=OutputKind.HIDDEN_STATES, layers=(3,), row_size=32)
    run = Run(plan=Plan(outputs=(output,), dtype="float32"), texts=[Text(np.arange(9, dtype=np.int32))])
    (rows,) = encoder.encode([run])
    assert np.isfinite(np.frombuffer(rows.data, np.float32)).all()


# Weights.

HEADS = {
    "roberta": [transformers.RobertaForMaskedLM, transformers.RobertaForSequenceClassification],
    "xlm-roberta": [transformers.XLMRobertaForMaskedLM, transformers.XLMRobertaForTokenClassification],
    "camembert": [transformers.CamembertForMaskedLM],
    "distilbert": [transformers.DistilBertForMaskedLM, transformers.DistilBertForSequenceClassification],
    "electra": [transformers.ElectraForPreTraining, transformers.ElectraForMaskedLM],
}


@pytest.mark.parametrize(
    ("kind", "model"), [(kind, model) for kind, models in HEADS.items() for model in models], ids=lambda one: str(one)
)
def test_weights_of_models_with_heads(kind: str, model: Any, tmp_path: Path) -> None:
    folder = family.save(kind, tmp_path, pooler=False)
    torch.manual_seed(1)
    model(transformers.AutoConfig.from_pretrained(str(folder))).save_pretrained(folder)
    names = safetensors.numpy.load_file(folder / "model.safetensors")
    assert any(name.startswith(("lm_head.", "classifier.", "vocab_", "discriminator_", "generator_")) for name in names)
    check(folder, Oracle.load(folder))


def weights(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        tensors = safetensors.numpy.load_file(folder / "model.safetensors")
        change(tensors)
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")

    return spoil


def settings(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: change(folder, **changes)


Q_LIN = "transformer.layer.1.attention.q_lin.weight"
REFUSED: dict[str, tuple[str, Callable[[Path], object], tuple[str, ...]]] = {
    "a missing weight by its own name": ("distilbert", weights(lambda w: w.pop(Q_LIN)), (f"lack {Q_LIN}",)),
    "another shape by its own name": (
        "distilbert",
        weights(lambda w: w.update({Q_LIN: np.zeros((3, 3), np.float32)})),
        (Q_LIN, "(3, 3)", "(32, 32)"),
    ),
    "a weight that is left over": (
        "distilbert",
        weights(lambda w: w.update({"transformer.layer.0.attention.more": np.zeros(1, np.float32)})),
        ("transformer.layer.0.attention.more", "plain distilbert"),
    ),
    "no projection": (
        "electra",
        weights(lambda w: w.pop("embeddings_project.weight")),
        ("embeddings_project.weight",),
    ),
    "no size of embeddings": ("electra", settings(embedding_size=None), ("embedding_size", "128", "24")),
    "no number of blocks": ("distilbert", settings(n_layers=None), ("transformer.layer.3", "n_layers")),
    "blocks that are none": ("distilbert", settings(n_layers=0), ("n_layers 0",)),
    "heads that do not divide": ("distilbert", settings(n_heads=5), ("dim 32", "5 heads")),
    "an activation with weights": ("distilbert", settings(activation="prelu"), ("activation 'prelu'",)),
    "an unknown activation": ("distilbert", settings(activation="swishy"), ("swishy",)),
    "no padding": ("roberta", settings(pad_token_id=-1), ("pad_token_id -1", "roberta")),
    "padding beyond the positions": ("xlm-roberta", settings(pad_token_id=65), ("pad_token_id 65", "to 64")),
    **{
        f"{name} of {kind}": (kind, settings(**{key: value}), (key, str(value) if key != "is_decoder" else key))
        for kind in KINDS
        for name, key, value in (
            ("a decoder", "is_decoder", True),
            ("chunks", "chunk_size_feed_forward", 7),
            ("relative positions", "position_embedding_type", "relative_key"),
        )
    },
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = family.save(kind, tmp_path_factory.mktemp("saved") / kind)
        return folders[kind]

    return folder


@pytest.mark.parametrize(("kind", "spoil", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_a_folder_that_is_refused_by_name(
    saved: Callable[[str], Path], tmp_path: Path, kind: str, spoil: Callable[[Path], object], named: tuple[str, ...]
) -> None:
    folder = Path(shutil.copytree(saved(kind), tmp_path / kind))
    spoil(folder)
    with pytest.raises(CheckpointError) as caught:
        Encoder(found(folder), device="cpu", dtype="float32")
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    for words in named:
        assert words in message, message


# Tokenizers.


def only_files(kind: str, folder: Path) -> Any:
    """Leaves of a tokenizer the files that its type had before there was tokenizer.json; returns the tokenizer."""
    tokenizer = family.TOKENIZERS[kind]()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    vocabulary = tokenizer.get_vocab()
    if kind in ("distilbert", "electra"):
        (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)) + "\n")
    else:
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    return tokenizer


@pytest.mark.parametrize("kind", ["distilbert", "electra", "roberta"])
def test_files_that_transformers_converts_are_enough(kind: str, tmp_path: Path) -> None:
    folder = family.save(kind, tmp_path)
    wanted = only_files(kind, folder)
    text = "I love Paris, and she does too; <pad> [PAD]"
    (one,) = Tokenizer(found(folder).tokenizer_folder).encode(
        [text], ["a text"], Tokenizing(max_length=64, truncation="error")
    )
    assert one.text.input_ids.tolist() == wanted(text)["input_ids"]


@pytest.mark.parametrize(("kind", "offset", "ends"), [("xlm-roberta", 1, [0, 2]), ("camembert", 4, [5, 6])])
def test_a_folder_with_sentencepiece_alone_gives_its_pieces(
    kind: str, offset: int, ends: list[int], tmp_path: Path
) -> None:
    folder = family.save(kind, tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer.*sentencepiece\.bpe\.model"):
        found(folder)
    written = io.BytesIO()
    corpus = ["the quick brown fox jumps over the lazy dog", "I love Paris, and she does too"] * 4
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=written, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    (folder / "sentencepiece.bpe.model").write_bytes(written.getvalue())
    text = "she jumps over Paris"
    pieces = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue()).encode(text)
    (one,) = Tokenizer(found(folder).tokenizer_folder).encode(
        [text], ["a text"], Tokenizing(max_length=64, truncation="error")
    )
    assert one.text.input_ids.tolist() == [ends[0], *(piece + offset for piece in pieces), ends[1]]


def test_sentencepiece_that_cannot_be_read_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    folder = family.save("xlm-roberta", tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / "sentencepiece.bpe.model").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match=r"fetch the model again.*save_pretrained"):
        Tokenizer(found(folder).tokenizer_folder)


@pytest.mark.parametrize("names", [["vocab.json"], ["merges.txt"]])
def test_half_of_a_vocabulary_is_refused(names: list[str], tmp_path: Path) -> None:
    folder = family.save("roberta", tmp_path)
    only_files("roberta", folder)
    for name in {"vocab.json", "merges.txt"} - set(names):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        found(folder)


def test_a_vocabulary_of_another_type_is_refused(tmp_path: Path) -> None:
    """Of such files transformers makes a tokenizer of special tokens alone, without a warning."""
    folder = family.save("roberta", tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nparis\n")
    with pytest.raises(CheckpointError, match="without words"):
        Tokenizer(found(folder).tokenizer_folder)
